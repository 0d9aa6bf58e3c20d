"""The scenes recipe in a few steps: a whole bridge, trained in seconds."""

from dataclasses import replace

from minblip2.training.recipes import SCENES

SHORT = replace(SCENES, experts={name: replace(config, steps=4) for name, config in SCENES.experts.items()},
                stage1=replace(SCENES.stage1, steps=4), stage2=replace(SCENES.stage2, steps=4))
