"""Stage 2 on captions only with a language model of the laboratory. python s2.py LM.pt NAME [steps] [layers] [seed]"""
import sys, random, time, json
from dataclasses import replace
from pathlib import Path
import numpy as np, torch
import torch.nn.functional as F
import lab
from lab import TOK, enc, Told
from minblip2 import experts, scenes, masks
from minblip2.recipes import SCENES
from minblip2.bridge import Bridge, divide, stage2_losses
from minblip2.data import CocoCaptions
from minblip2.evaluation import ask, scene_accuracy
from minblip2.opt import OPT, OPTConfig
from minblip2.stage1 import Stage1
from minblip2.train import learning_rate, parameter_groups, load_weights
from minblip2.attention import KVCache
from functools import partial
RUN = Path('runs/scenes0'); DATA = Path('runs/scenes-data')

def parts_with(lm_path, layers=3):
    a = lab.arguments([]); state = torch.load(lm_path)
    a.heads = int(__import__('os').environ.get('HEADS', 4)); a.layers = 1 + max(int(k.split('.')[1]) for k in state if k.startswith('blocks.')); a.mlp, a.width = state['blocks.0.mlp.up.weight'].shape
    lm = lab.make_lm(a); lm.load_state_dict(state); lm.requires_grad_(False).eval()
    def given(folder, config): return lm, TOK
    experts.train_lm = given
    parts = SCENES.build(SCENES, DATA, None, RUN)
    return parts

@torch.no_grad()
def ask_all(lm, soft, truths, items):
    """items: (row, kind, q, answer); soft(row) or None. Teacher-forced exact answers."""
    res = {}
    for i in range(0, len(items), 200):
        some = items[i:i+200]
        rows = [[TOK.end] + enc('question ' + q + ' answer') + enc(ans) + [TOK.end] for _, _, q, ans in some]
        ids, real = TOK.pad(rows)
        emb, n = lm.embed(ids), 0
        if soft is not None:
            s = torch.stack([soft(r) for r, *_ in some]); n = s.shape[1]
            emb = torch.cat([s, emb], 1); real = F.pad(real, (n, 0), value=True)
        top = lm.head(lm(emb, masks.causal(real))).argmax(-1)[:, n:]
        for k, (r, kind, q, ans) in enumerate(some):
            a = enc(ans) + [TOK.end]; p = len(rows[k]) - len(a) - 1
            res.setdefault(kind, []).append((all(int(top[k, p + j]) == x for j, x in enumerate(a)), truths[r].unseen))
    return res

def report(lm, softs, truths, items, told):
    n = len(truths)
    out = {}
    for name, soft in (('own', lambda r: softs[r]), ('other', lambda r: softs[(r + 2) % n]), ('none', None)):
        for kind, v in ask_all(lm, soft, truths, items).items():
            row = out.setdefault(kind, {'n': len(v)})
            row[name] = round(100 * np.mean([a for a, _ in v]), 1)
            if name == 'own': row['seen/unseen'] = '%.1f/%.1f' % tuple(100 * np.mean([a for a, u in v if u == w]) for w in (False, True))
    for kind, v in told.items(): out[kind]['told'] = v
    return out

def main(lm_path, name, steps=3000, layers=3, seed=0, share=.5, lr=1e-3):
    parts = parts_with(lm_path, layers); lm = parts.lm
    recipe = replace(SCENES, warm_start=share, stage2=replace(SCENES.stage2, steps=steps, seed=seed, learning_rate=lr))
    b = Bridge(recipe, parts, recipe.new_stage1(parts), None, torch.device('cpu'))
    load_weights(b.stage1, RUN / 'stage1' / 'model.safetensors'); b.stage1.eval()
    train, val = CocoCaptions(DATA, 'train'), CocoCaptions(DATA, 'val')
    feats, vf = b.features(train, RUN / 'cache'), b.features(val, RUN / 'cache')
    truths = scenes.load_scenes(DATA, 'val'); vf = torch.from_numpy(np.array(vf)).float()
    rng = random.Random(0)
    items = [(r, *q) for r, s in enumerate(truths) for q in lab.questions(s, rng)]
    class ValTold(Told): pass
    b.begin_stage2(feats); m = b.stage2.train()
    pairs = b.pairs(train, [feats], for_lm=True).iterate(0)
    cfg = recipe.stage2
    opt = torch.optim.AdamW(parameter_groups(m, cfg), lr=cfg.learning_rate, betas=cfg.betas, fused=True)
    softs = lambda: torch.cat([m.soft_prompt(c) for c in vf.split(100)])
    told = Told(150).questions(lm); lm.eval()
    t0, te, mean = time.time(), 0, []
    def measure(final=False):
        m.eval()
        with torch.no_grad(): out = report(lm, softs(), truths, items if final else items[:1500], told)
        for k, v in out.items(): print('  ', k, v, flush=True)
        unseen = np.array([s.unseen for s in truths])
        caps = dict(things='a picture of', positions='this picture shows', relations='we see', size='there is', background='on a')
        res = {}
        for what, prompt in caps.items():
            if not final and what != 'things': continue
            text = ask(b, vf, prompt)
            if what == 'things': print([t for t in text[:6]])
            v = [scenes.judge(t, s) for t, s in zip(text, truths)]
            if what == 'things':
                t = np.array([x['things'] for x in v]); res['things seen/unseen'] = '%.1f/%.1f' % (100*t[~unseen].mean(), 100*t[unseen].mean())
            else:
                told_ = [x[what] for x in v if x[what] is not None]; cond = [x[what] for x in v if x[what] is not None and x['things']]
                res[what] = '%.1f (%d), of those with things right %.1f (%d)' % (100*np.mean(told_), len(told_), 100*np.mean(cond) if cond else -1, len(cond))
        print('  captions', res, flush=True)
        m.train()
        return out, res
    for s in range(steps):
        for g in opt.param_groups: g['lr'] = learning_rate(s, cfg) * g['gain']
        batch = next(pairs)
        loss = m(batch.image, *divide(batch, TOK, '')).loss
        opt.zero_grad(); loss.backward(); torch.nn.utils.clip_grad_norm_([p for p in m.parameters() if p.requires_grad], cfg.clip); opt.step()
        mean.append(loss.item())
        if (s + 1) % 300 == 0: print(s + 1, 'loss %.3f' % np.mean(mean[-300:]), '%.0f s' % (time.time() - t0 - te), flush=True)
        if (s + 1) in (600, 1500): t1 = time.time(); measure(); te += time.time() - t1
    out, res = measure(True)
    torch.save(m.state_dict(), f'{name}.pt')
    with open('log.md', 'a') as f:
        f.write(f'\n## stage 2 {name}: {lm_path} steps {steps} share {share} seed {seed} lr {lr}, {time.time()-t0-te:.0f} s\n' + '\n'.join(f'{k}: {v}' for k, v in out.items()) + f'\ncaptions {res}\n')

if __name__ == '__main__':
    kw = dict(x.split('=') for x in sys.argv[3:])
    main(sys.argv[1], sys.argv[2], **{k: (float(v) if '.' in v else int(v)) for k, v in kw.items()})
