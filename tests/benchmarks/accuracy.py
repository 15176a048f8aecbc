"""Measures how far every spline is from its oracle: `python -m tests.benchmarks.accuracy`.

A row shows, for one number of knots n and smoothing mu, the largest relative error (largest error over largest
magnitude) over Chebyshev and random knots, eleven masks and three kinds of data. The oracle is SciPy in float64 where
SciPy is accurate, and 60-digit arithmetic elsewhere. The column "oracle" says which, for all knots; where a mask leaves
few of them, it may be SciPy again. Exits with 1 if an error is above its limit.
"""

import argparse
import sys

from tqdm import tqdm

from tests.interpolants.spline import cases
from tests.interpolants.spline.measure import PROGRAMS, error_limit, errors, scipy_is_right


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=cases.SIZES, help="numbers of knots")
    parser.add_argument("--smoothings", type=float, nargs="+", default=cases.SMOOTHINGS, help="values of mu")
    parser.add_argument("--seed", type=int, default=0, help="of random knots, masks and data")
    options = parser.parse_args(argv)

    print(f"{'n':>5} {'mu':>7}  " + "  ".join(f"{program:>14}" for program in PROGRAMS) + "   oracle", flush=True)
    exceeded = []
    for n in options.sizes:
        for smoothing in options.smoothings:
            largest = dict.fromkeys(PROGRAMS, (0.0, ""))
            for layout in ("chebyshev", "random"):
                progress = tqdm(
                    errors(n, layout, smoothing, options.seed),
                    desc=f"n={n} mu={smoothing:g} {layout}",
                    leave=False,
                    unit="mask",
                )
                for mask, errors_of_mask in progress:
                    for program, error in errors_of_mask.items():
                        largest[program] = max(largest[program], (error, f"{layout}, {mask}"))
            oracle = "SciPy" if scipy_is_right(n, smoothing) else "60 digits"
            figures = "  ".join(f"{largest[program][0]:14.1e}" for program in PROGRAMS)
            print(f"{n:5d} {smoothing:7.0e}  {figures}   {oracle}", flush=True)
            exceeded += [(n, smoothing, p, *largest[p]) for p in PROGRAMS if not largest[p][0] <= error_limit(p)]
    for n, smoothing, program, error, case in exceeded:
        print(f"exceeded: {program} at n={n}, mu={smoothing:g}: {error:.1e} > {error_limit(program):.0e} ({case})")
    if not exceeded:
        print("every error is within its limit: 1e-9 in float64, 1e-5 in float32")
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
