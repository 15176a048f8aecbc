"""Measures how far every spline is from its oracle: `python -m tests.benchmarks.accuracy`.

One row for each number of knots n and smoothing mu, the worst over Chebyshev and random knots, eleven masks and three
kinds of data of the error (largest error over largest magnitude). The oracle is SciPy in float64 where SciPy is right
and 60-digit arithmetic elsewhere, which the column "oracle" says (of all knots: where a mask leaves few, it may be
SciPy again). Exits with 1 if a bar is missed.
"""

import argparse
import sys

from tqdm import tqdm

from tests.interpolants.spline import cases
from tests.interpolants.spline.measure import PROGRAMS, bar, errors, scipy_is_right


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=cases.SIZES, help="numbers of knots")
    parser.add_argument("--smoothings", type=float, nargs="+", default=cases.SMOOTHINGS, help="values of mu")
    parser.add_argument("--seed", type=int, default=0, help="of random knots, masks and data")
    options = parser.parse_args(argv)

    print(f"{'n':>5} {'mu':>7}  " + "  ".join(f"{program:>14}" for program in PROGRAMS) + "   oracle", flush=True)
    missed = []
    for n in options.sizes:
        for smoothing in options.smoothings:
            worst = dict.fromkeys(PROGRAMS, (0.0, ""))
            for layout in ("chebyshev", "random"):
                progress = tqdm(
                    errors(n, layout, smoothing, options.seed),
                    desc=f"n={n} mu={smoothing:g} {layout}",
                    leave=False,
                    unit="mask",
                )
                for mask, errors_of_mask in progress:
                    for program, error in errors_of_mask.items():
                        worst[program] = max(worst[program], (error, f"{layout}, {mask}"))
            oracle = "SciPy" if scipy_is_right(n, smoothing) else "60 digits"
            figures = "  ".join(f"{worst[program][0]:14.1e}" for program in PROGRAMS)
            print(f"{n:5d} {smoothing:7.0e}  {figures}   {oracle}", flush=True)
            missed += [(n, smoothing, p, *worst[p]) for p in PROGRAMS if not worst[p][0] <= bar(p)]
    for n, smoothing, program, error, case in missed:
        print(f"missed: {program} at n={n}, mu={smoothing:g}: {error:.1e} > {bar(program):.0e} ({case})")
    if not missed:
        print("every error within its bar: 1e-9 in float64, 1e-5 in float32")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
