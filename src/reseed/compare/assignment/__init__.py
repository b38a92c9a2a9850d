"""The exact one-to-one assignment of the rows of two matrices that maximises the sum of cosines.

The entry point is `reseed.compare.matching.match`. The method is primal-dual and never holds the
n × m matrix of cosines:

    rows        unit rows; identical rows are collapsed into groups
    candidates  one pass of low-precision products: the K best pairs of every row and column, and
                an upper bound on the cosine of every other pair
    edges       the listed pairs as a sparse graph, with cosines in float64
    auction     a nearly optimal assignment on the graph, with its prices
    state       a partial assignment with its prices
    paths       shortest augmenting paths: the optimum on the graph, with exact prices
    centre      among optimal prices, those that leave few pairs open
    pricing     the pairs outside the graph that prices and bounds leave open: it computes them
                and turns those that would improve the assignment into edges
    solve       the loop of paths, centre and pricing, until no pair is open
    ties        the rows that have an equally good alternative

Letters: rows i = 1 … n have prices u_i, columns j = 1 … m ≥ n have prices v_j ≥ 0, S_ij is the
cosine. Prices with u_i + v_j ≥ S_ij for *all* pairs prove that no assignment sums to more than
Σu + Σv; an assignment that reaches this sum is optimal (linear programming duality). Unused
columns have the price 0.

The method is column generation. The auction is that of Bertsekas (1988), the shortest paths are
those of Jonker & Volgenant (1987).
"""
