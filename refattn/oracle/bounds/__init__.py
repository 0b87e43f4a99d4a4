"""How far correct arithmetic may stray: one file per way of bounding it.

    scored      weights of scores, through a plan: the sharp bounds
    recurrent   states written and read token by token, through a recurrence
    extremes    what these lose where numbers on the way leave their format, and where nothing is decided
    perturbed   anything, by how its definition answers to operands perturbed by a unit roundoff

A `Bound` has two versions, and whoever uses it takes the smaller, element by element.

worst
    Every rounding at its limit and of the worst sign.  A sum of k terms is off by at most k u / (1 - k u) times the sum of their magnitudes
    (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1).
likely
    Roundings independent with mean zero: sqrt(k) in place of k, the root of the sum of squares in place of sums, times `spread`, which makes the
    chance that one of N correct outputs is refused at most alpha (Higham and Mary, SIAM J. Sci. Comput. 41(5), 2019).  What is of one sign
    throughout a row or a call (the last rounding of the output, a constant rounded once) is added linearly to both.
"""

from .bound import Bound as Bound
from .bound import spread as spread
