"""The command line with a scenes recipe that takes seconds: python -m tests.spread_command train --out ...

SPREAD_PAUSE: seconds between steps. SPREAD_BROKEN: the process whose losses stop being numbers in step 3 of stage 1.
"""

import functools
import os
import sys
import time
from dataclasses import replace

import torch

from minblip2 import UserError, __main__
from minblip2.data.progress import forgiving_output
from minblip2.training import bridge, experts
from minblip2.training.distributed import env_rank_and_size
from minblip2.training.recipes import RECIPES, SCENES

SHORT = replace(SCENES, experts={name: replace(config, steps=2, precision="float32")
                                 for name, config in SCENES.experts.items()},
                stage1=replace(SCENES.stage1, steps=24, batch_size=15, warmup=4, checkpoint_every=4,
                               precision="float32"),
                stage2=replace(SCENES.stage2, steps=4, batch_size=15, precision="float32"))


def with_trouble(losses):
    steps = []

    def troubled(*inputs, **settings):
        steps.append(time.sleep(float(os.environ.get("SPREAD_PAUSE", 0))))
        if len(steps) == 3 and os.environ.get("SPREAD_BROKEN") == str(env_rank_and_size()[0]):
            raise UserError("something that only this process has met")
        return losses(*inputs, **settings)

    return troubled


if __name__ == "__main__":
    forgiving_output()
    RECIPES["scenes"] = SHORT
    experts.SceneImages = functools.partial(experts.SceneImages, scenes=64)
    bridge.stage1_losses = with_trouble(bridge.stage1_losses)
    torch.set_num_threads(1)
    sys.exit(__main__.main())
