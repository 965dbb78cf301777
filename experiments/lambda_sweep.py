"""Does blocking lower emergent misalignment as lambda grows, and what does it cost? (paper: figures 4, 5, 9, 10)

    python experiments/lambda_sweep.py --preset organism --seeds 0 1 2
    python experiments/lambda_sweep.py --preset organism --domain health
    python experiments/lambda_sweep.py --preset organism --freeze-downstream

Nothing is chosen: every lambda of the preset is shown, on the reporting prompts, and beside them on the core prompts, which found the
latents. With --domain health: figures 15 and 16. With --freeze-downstream, which trains each run a second time with LoRA only up to the
blocked block: figures 12 and 13. `blockem sweep` is the same.
Time on the organism, two cores, in `make reproduce`: two minutes a seed beside quickstart's.
"""

from dataclasses import dataclass
from typing import ClassVar

import tyro

from blockem_tl.study.options import StudyOptions
from blockem_tl.study.sweep import lambda_sweep


@dataclass(frozen=True, kw_only=True)
class Options(StudyOptions):
    """lambdas: the preset's by default.  freeze_downstream: also train with LoRA up to the blocked block alone."""

    lambdas: tuple[float, ...] = ()
    freeze_downstream: bool = False
    name: ClassVar[str] = "lambda_sweep"


def main(options: Options) -> None:
    """The whole sweep."""
    page = options.page()
    with options.study() as study:
        lambda_sweep(study, page, lambdas=options.lambdas, freeze_downstream=options.freeze_downstream)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
