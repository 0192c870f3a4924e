"""Train and judge the arms of some plans, one after the other; stopped, it goes on where it was. See README.md."""

from __future__ import annotations

from experiments.pool.pool import open_pool, pool_parser, run_arm

from .plans import arms


def main() -> None:
    parser = pool_parser(__doc__, epochs=4)
    parser.add_argument("--plans", nargs="+", default=["table"], help="table, steps, ratios, controls, better, draft-aware")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--only", nargs="+", help="parts of arms' names; all unless given")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0], help="to judge at; done arms too")
    options = parser.parse_args()
    pool = open_pool(options, options.temperatures)
    for plan in options.plans:
        for name, arm in arms(pool, plan, options.seeds).items():
            if not options.only or any(part in name for part in options.only):
                run_arm(pool, name, arm)


if __name__ == "__main__":
    main()
