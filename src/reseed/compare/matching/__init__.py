"""One-to-one matching of the rows of two matrices by cosine.

Paulo & Belrose (arXiv 2501.16615), section 3: rows are normalised, S = A·Bᵀ, and σ is the
assignment that maximises Σ S[i, σ(i)], found exactly by `match`. `MatchingCache` stores matchings.

The method is primal-dual and never holds S, the n × m matrix of cosines. In reading order:

    exact       `match`: checks of the input, the proof, and rows that have an equally good
                alternative; `MatchingCache`, a folder of finished matchings
    solve       an auction for a nearly optimal assignment on the graph; then the loop of paths,
                centring and pricing, until no pair is open
    rows        unit rows; identical rows are collapsed into groups
    candidates  one pass of low-precision products: the K best pairs of every row and column, and
                an upper bound on the cosine of every other pair
    graph       the listed pairs as a sparse graph, with cosines in float64; a partial assignment
                with its prices
    paths       shortest augmenting paths: the optimum on the graph, with exact prices
    pricing     among optimal prices, those that leave few pairs open; the pairs outside the graph
                that prices and bounds leave open: it computes them, and those that would improve
                the assignment become edges

Letters: rows i = 1 … n have prices u_i, columns j = 1 … m ≥ n have prices v_j ≥ 0, S_ij is the
cosine. Prices with u_i + v_j ≥ S_ij for *all* pairs prove that no assignment sums to more than
Σu + Σv; an assignment that reaches this sum is optimal (linear programming duality). Unused
columns have the price 0.

The method is column generation. The auction is that of Bertsekas (1988), the shortest paths are
those of Jonker & Volgenant (1987).
"""

from reseed.compare.matching.exact import Matcher, Matching, MatchingCache, match

__all__ = ["Matcher", "Matching", "MatchingCache", "match"]
