"""``summary.tex``, read by a small reader that returns the text that LaTeX would print."""

import re
from dataclasses import replace

import pytest

from reseed.report.markup import PREAMBLE, latex_table, latex_text, summary_latex
from reseed.report.table import Table, main_table
from reseed.report.table_files import write_tables

COMMANDS = {
    "textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "ldots": "…",
    "lambda": "λ", "kappa": "κ", "tau": "τ", "sigma": "σ", "Sigma": "Σ", "approx": "≈",
    "geq": "≥", "leq": "≤", "neq": "≠", "times": "×", "cdot": "·", "rightarrow": "→",
}  # fmt: skip


def typeset(source):
    """Return the printed characters of source without environments; refuse what LaTeX would not
    read as text."""
    out, at, depth, maths = "", 0, 0, False
    while at < len(source):
        character = source[at]
        name = re.match(r"\\([A-Za-z]+|.)", source[at:])
        if character == "\\":
            assert name is not None
            word = name[1]
            at += len(name[0])
            out += word if word in "{}&%$#_" else COMMANDS[word]
            continue
        assert character not in '&%#~^"|' or maths, f"{character!r} has a meaning"
        if character == "$":
            maths = not maths
        elif character in "{}":
            depth += 1 if character == "{" else -1
            assert depth >= 0
        elif character in "<>":
            assert maths, "the old font encoding shows ¡ and ¿"
            out += character
        elif character == "_":
            assert maths
        else:
            out += character
        at += 1
    assert depth == 0
    assert not maths
    return out.replace("--", "–")


PRINTABLE = "".join(map(chr, range(32, 127))).translate({ord(c): None for c in '"|-'})


@pytest.mark.parametrize(
    "text",
    [PRINTABLE, PRINTABLE[::-1], "λ=3.6, L0≈8", "κ ≥ τ ≤ σ ≠ Σ → ×·…", "–", "a_b{c}\\d", "{[}"],
)
def test_every_character_is_printed_as_itself(text):
    assert typeset(latex_text(text)) == text


@pytest.mark.parametrize(
    ("text", "source"),
    [("a|b", "a$|$b"), ('"x"', "''x''"), ("−0.5", "$-$0.5"), ("S₀", "S$_0$"), ("5%", r"5\%")],
)
def test_characters_without_a_glyph_are_replaced(text, source):
    assert latex_text(text) == source


@pytest.mark.parametrize("first", ["[0.1, 0.2]", "*", "[x"])
def test_no_entry_is_read_as_the_argument_of_a_line_break(first):
    source = latex_table(Table(("a\n[95%]", "b"), ((first, "1"), (first, "2")), 1, "", ()), "", "t")
    for after in re.findall(r"\\\\\s*(\S)", source):
        assert after not in "[*", source


def rows_of(table):
    body = table.partition(r"\toprule")[2].partition(r"\bottomrule")[0]
    lines = [line for line in body.splitlines() if line and line != r"\midrule"]
    assert all(line.endswith(r" \\") for line in lines)
    return [re.split(r"(?<!\\)&", line.removesuffix(r" \\")) for line in lines]


def test_the_rows_equal_the_terminal_s(cells):
    words = main_table(cells)
    table = latex_table(words, "", "tab:x")
    head, *rows = rows_of(table)
    assert [tuple(typeset(entry).strip() for entry in row) for row in rows] == [
        tuple(entry for entry in row) for row in words.rows
    ]
    plain = [entry.replace(r"\shortstack", "").replace(r"\\", "") for entry in head]
    assert [" ".join(typeset(entry).split()) for entry in plain] == [
        name.replace("\n", " ") for name in words.header
    ]
    columns = re.search(r"\\begin\{tabular\}\{(\w+)\}", table)
    assert columns is not None
    assert columns[1] == "l" * words.num_knobs + "r" * (len(words.header) - words.num_knobs)


def test_the_caption_states_n_interval_and_tokens(cells):
    source = summary_latex(cells, [main_table(cells)], "my_study: 1")
    caption = re.search(r"\\caption\{(.*)\}\n", source)
    assert caption is not None
    said = typeset(caption[1])
    assert said.startswith("model=embedded · layer=2 · 48 latents · 2–3 seeds. ")
    assert "n = 2–3 seeds with the 95% interval over seeds; 5,000 held-out tokens." in said
    assert r"\label{tab:my-study-1}" in source


def test_two_seeds_have_no_interval(make_cell):
    cells = [make_cell(n=2)]
    assert "n = 2 seeds, no interval; 5,000 held-out" in summary_latex(cells, [main_table(cells)])


def test_footnotes_are_sentences_and_keep_bold_text(cells):
    words = replace(main_table(cells), footnotes=("**a_b**: 5% of `x_y`", "**end**"))
    table = latex_table(words, "", "t")
    assert r"\textbf{a\_b}: 5\% of \texttt{x\_y}. \textbf{end}." in table


def test_environments_and_braces_are_closed(cells, tmp_path):
    write_tables(cells, tmp_path)
    source = (tmp_path / "summary.tex").read_text()
    assert source.startswith(PREAMBLE)
    opened = []
    for which, name in re.findall(r"\\(begin|end)\{(\w+)\}", source):
        if which == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert opened == []
    bare = re.sub(r"\\[{}\\%]", "", source)
    assert bare.count("{") == bare.count("}")
    assert all(ord(c) < 0x250 for c in source), "no letter that LaTeX has no glyph for"


def test_each_table_has_a_label_of_its_own(cells):
    source = summary_latex(cells, [main_table(cells)] * 3, "x")
    assert re.findall(r"\\label\{(.*?)\}", source) == ["tab:x", "tab:x-2", "tab:x-3"]
