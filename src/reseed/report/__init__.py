"""Tables and figures of a comparison, from the measures of `reseed.compare`.

`format` writes numbers, `axes` names cells, `table` makes tables of them, `style` is the look of
all figures. `main_table` and `summary_tables` are what ``summary.md`` shows; `tables` and `figures`
write all files; `terminal` and `latex` typeset tables; `page` is the HTML report.
"""
