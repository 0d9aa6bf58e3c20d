"""ViT and stage 1 of the scenes recipe, without its language model. python stage1.py [seed]"""
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from minblip2 import experts
from minblip2.opt import OPT, OPTConfig
def no_lm(folder, config):
    tok = experts.lm_tokenizer()
    return OPT(OPTConfig(vocabulary=len(tok), width=128, layers=1, heads=4, mlp_width=512, positions=128)), tok
experts.train_lm = no_lm
from minblip2.recipes import SCENES
from minblip2.bridge import train_bridge
seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
train_bridge(SCENES.with_seed(seed), None, None, Path('runs') / f'scenes{seed}', stages=1)
print('done')
