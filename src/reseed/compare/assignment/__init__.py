"""The exact one-to-one assignment of the rows of two matrices that maximises the sum of cosines.

`reseed.compare.matching.match` is the way in. Inside, a primal-dual method that never holds the
n × m matrix of cosines:

    rows        unit rows, identical ones collapsed into groups
    candidates  one pass of low-precision products: the K best of every row and of every column,
                and with them an upper bound on every pair that was not listed
    edges       the listed pairs as a sparse graph, with cosines in float64
    auction     an assignment that is nearly optimal on the graph, with its prices
    state       a partial assignment with its prices
    paths       shortest augmenting paths: the optimum on the graph, its prices exact
    centre      of prices that are as good, those that leave few pairs open
    pricing     which pairs outside the graph the prices and the bounds leave open; those are
                computed, and the ones that would do better become edges
    solve       the loop of paths, centre and pricing, until no pair is left open
    ties        which rows have an equally good alternative

Letters: rows i = 1 … n with prices u_i, columns j = 1 … m ≥ n with prices v_j ≥ 0, S_ij the
cosine. Prices with u_i + v_j ≥ S_ij for *all* pairs prove that no assignment sums to more than
Σu + Σv; one that reaches it is optimal (linear programming duality). Columns that nobody needs
have the price 0.

The method is column generation; the auction is Bertsekas's (1988), the shortest paths are those of
Jonker & Volgenant (1987).
"""
