"""Language-model laboratory: endless scenes in text, questions, trials. Throw-away."""
import sys, random, time, json, re, argparse
import numpy as np, torch
import torch.nn.functional as F
torch.set_num_threads(1)
from minblip2 import experts, scenes, masks
from minblip2.scenes import *
from minblip2.scenes import _caption, _keywords, _holds
from minblip2.opt import OPT, OPTConfig
from minblip2.tokenizer import Tokenizer
from minblip2.attention import KVCache

COMPARED = dict(large='larger', small='smaller')
NUM = ('one', 'two', 'three')
KINDS = ('plain', 'positions', 'size', 'relation', 'background')

def fast_scene(rng):
    """A scene as `draw` would place it, without drawing."""
    count = rng.choices((1, 2, 3), weights=(1, 2, 2))[0]
    if rng.random() < .3:
        first = rng.choice(HELD_OUT)
        pairs = [first, *rng.sample([p for p in SEEN + HELD_OUT if p != first], count - 1)]
    else:
        pairs = rng.sample(SEEN, count)
    cells = rng.sample(range(9), count)
    things = []
    for (c, s), cell in zip(pairs, cells):
        x, y = (cell % 3 + .5) * SIDE / 3, (cell // 3 + .5) * SIDE / 3
        things.append(Thing(c, s, rng.choice(tuple(SIZES)), (int(x) - 6, int(y) - 6, 12, 12)))
    return Scene(tuple(things), rng.choice(tuple(BACKGROUNDS)))

def keywords(scene, rng, full=False):
    groups, told = [[scene.background]], {'background'}
    for i, t in enumerate(scene.things):
        words = [t.colour, t.shape]
        if full or rng.random() < .7:
            words.append(t.size); told.add(('size', i))
        words = rng.sample(words, len(words))
        if full or rng.random() < .85:
            words = words + [t.position]; told.add(('pos', i))
        groups.append(words)
    return ', '.join(' '.join(g) for g in rng.sample(groups, len(groups))), told

def caption(scene, kind, rng):
    text = _caption(scene, kind, rng)
    told = set()
    if 'background' in text: told.add('background')
    if kind in ('positions', 'background', 'size'): told |= {('pos', i) for i in range(len(scene.things))}
    if 'small' in text or 'large' in text: told |= {('size', i) for i in range(len(scene.things))}
    return text, told

def questions(scene, rng, told=None, asym=0.):
    """(kind, question, answer) of all that is told (None: everything)."""
    out = [('count', 'how many things are there', NUM[len(scene.things) - 1])]
    ok = lambda *keys: told is None or all(k in told for k in keys)
    if ok('background'): out.append(('background', 'what colour is the background', scene.background))
    shapes = [t.shape for t in scene.things]; colours = [t.colour for t in scene.things]
    for i, t in enumerate(scene.things):
        if shapes.count(t.shape) == 1:
            out.append(('colour', f'what colour is the {t.shape}', t.colour))
            if ok(('pos', i)): out.append(('where', f'where is the {t.shape}', t.position))
            if ok(('size', i)): out.append(('size', f'what size is the {t.shape}', t.size))
            # is the star red: half no, where possible with a colour that another thing has
            if rng.random() < .5: c = t.colour
            else:
                others = [c for c in colours if c != t.colour]
                c = rng.choice(others) if others and rng.random() < .7 else rng.choice([c for c in COLOURS if c != t.colour])
            out.append(('yesno', f'is the {t.shape} {c}', 'yes' if c == t.colour else 'no'))
        if colours.count(t.colour) == 1:
            out.append(('shape', f'what shape is the {t.colour} thing', t.shape))
    s = rng.choice(shapes) if rng.random() < .5 else rng.choice([s for s in SHAPES if s not in shapes])
    out.append(('exists', f'is there {"a"} {s}', 'yes' if s in shapes else 'no'))
    unique = [i for i, s in enumerate(shapes) if shapes.count(s) == 1]
    for i in unique:
        for j in unique:
            if i == j: continue
            a, b = scene.things[i], scene.things[j]
            if ok(('pos', i), ('pos', j)):
                yes = [r for r in OPPOSITE if _holds(a, r, b)]
                no = [OPPOSITE[r] for r in yes]
                r = rng.choice(yes if rng.random() < .5 else no)
                if rng.random() < asym and r in ('right of', 'below'): r = OPPOSITE[r]
                out.append(('relation', f'is the {a.shape} {r} the {b.shape}', 'yes' if r in yes else 'no'))
            if ok(('size', i), ('size', j)) :
                w = 'large' if rng.random() < .5 + asym / 2 else 'small'
                if a.size != b.size and rng.random() < .2 and a.size != w: w = a.size   # as many yes as no
                if a.size == b.size and rng.random() < .6: continue
                out.append(('compare', f'is the {a.shape} {COMPARED[w]} than the {b.shape}', 'yes' if a.size == w != b.size else 'no'))
    return out

def make_tok():
    rng = random.Random(0)
    texts = []
    for _ in range(300):
        s = fast_scene(rng)
        texts += write_captions(s, rng) + [keywords(s, rng)[0]]
        texts += [f'question {q} answer {a}' for _, q, a in questions(s, rng)]
    w = Tokenizer.words(texts)
    return Tokenizer(w.backend, [w.end], w.end, w.pad_id)

TOK = make_tok()
VOCAB = TOK.backend.get_vocab()
enc = lambda text: [VOCAB[w] for w in re.findall(r'\w+|[^\w\s]', text)]
NOUNS = [VOCAB[w] for w in [*COLOURS, *SHAPES, *BACKGROUNDS, *SIZES, 'top', 'left', 'right', 'bottom', 'middle']]

class Rows:
    """ids, weights of endless rows."""
    def __init__(self, a): self.a = a
    def scene_row(self, rng, step):
        a, end = self.a, TOK.end
        scene = fast_scene(rng)
        if step < a.two_until:
            while len(scene.things) < 2: scene = fast_scene(rng)
        ids, w = [end], [0.]
        def text(t):
            e = enc(t); ids.extend(e); ids.append(end); w.extend([a.wtext] * (len(e) + 1))
        def qa(q, ans):
            e = enc('question ' + q + ' answer'); ids.extend(e); w.extend([a.wq] * len(e))
            e = enc(ans); ids.extend(e); w.extend([a.wans] * len(e)); ids.append(end); w.append(a.wtext)
        told = set()
        pieces = []
        if step < a.plain_until:
            t, told = caption(scene, 'plain', rng)
        elif rng.random() < a.pkey:
            t, told = keywords(scene, rng)
        else:
            kinds = ['positions', 'background', 'size', 'positions', 'background', 'plain'] + ['relation'] * (len(scene.things) > 1)
            t, told = caption(scene, rng.choice(kinds), rng)
        if rng.random() < a.pblind: told = set()
        else: text(t)
        if a.ncap and step >= a.simple_until and rng.random() < .5:  # a second text before the questions
            t, more = caption(scene, rng.choice(KINDS), rng) if len(scene.things) > 1 else caption(scene, rng.choice(('plain','positions','size','background')), rng)
            text(t); told |= more
        qs = questions(scene, rng, told, .9 if step < a.asym_until else 0.)
        if a.only: qs = [q for q in qs if q[0] in a.only.split(',')] or qs
        if step < a.simple_until: qs = [q for q in qs if q[0] in ('colour', 'shape')] or qs
        # equal chances for the kinds, not for the things
        per = {}
        for q in qs: per.setdefault(q[0], []).append(q)
        names = [k for k in per for _ in range(a.rel if k in ('relation', 'compare') and step >= a.rel_from else 1)]
        # With replacement: where every thing is asked about once, the last answers follow from the first ones.
        order = [rng.choice(per[rng.choice(names)]) for _ in range(a.nq)]
        mix = [('q', q) for q in order]
        if a.ncap and step >= a.simple_until:
            many = len(scene.things) > 1
            kinds = [rng.choice(['plain', 'positions', 'size', 'background'] + ['relation'] * (a.relcap if many else 0)) for _ in range(rng.randint(1, a.ncap))]
            mix += [('c', k) for k in kinds]
            if rng.random() < a.pkeymix: mix.append(('k', None))
            rng.shuffle(mix)
        for what, x in mix:
            if what == 'q': qa(x[1], x[2])
            elif what == 'k': text(keywords(scene, rng)[0])
            else: text(caption(scene, x, rng)[0])
        return ids, w
    def copy_row(self, rng):
        """Nonsense words, and pieces of what stood there: only what followed before tells what follows."""
        seq = rng.sample(NOUNS, rng.randint(5, 13))
        ids = [TOK.end] + seq; w = [0.] * len(ids)
        while len(ids) < 36:
            k = rng.randrange(len(seq)); part = seq[k:k + rng.randint(2, 4)]
            if len(part) > 1: ids += [TOK.end] + part; w += [0., 0.] + [1.] * (len(part) - 1)
        return ids[:36], w[:36]
    def batch(self, step):
        g, k = divmod(step, 4)   # four batches at a time, each of rows of similar length
        if getattr(self, 'group', None) != g:
            rng = random.Random(f'{self.a.seed} {g}')
            rows = [self.copy_row(rng) if step < self.a.copy_until or rng.random() < self.a.pcopy else self.scene_row(rng, step) for _ in range(4 * self.a.bs)]
            rows.sort(key=lambda r: len(r[0]))
            self.four = [rows[n * self.a.bs:(n + 1) * self.a.bs] for n in range(4)]
            rng.shuffle(self.four); self.group = g
        rows = self.four[k]
        L = max(len(i) for i, _ in rows)
        ids = torch.full((len(rows), L), TOK.pad_id); w = torch.zeros(len(rows), L); m = torch.zeros(len(rows), L, dtype=torch.bool)
        for r, (i, x) in enumerate(rows):
            ids[r, :len(i)] = torch.tensor(i); w[r, :len(x)] = torch.tensor(x); m[r, :len(i)] = True
        return ids, w, m

def sinusoids(n, d, std):
    pos = torch.arange(n)[:, None].float(); f = torch.exp(-np.log(10000.) * torch.arange(0, d, 2) / d)
    t = torch.zeros(n, d); t[:, 0::2] = torch.sin(pos * f); t[:, 1::2] = torch.cos(pos * f)
    return t * (std / .7071)

def make_lm(a):
    torch.manual_seed(a.seed)
    lm = OPT(OPTConfig(vocabulary=len(TOK), width=a.width, layers=a.layers, heads=a.heads, mlp_width=a.mlp or 4 * a.width, positions=a.positions))
    from prev import table
    if a.pos == 'fast': lm.positions.weight.data.copy_(table(a.positions + 2, a.width, a.posstd, 2., .02))
    if a.pos == 'sin': lm.positions.weight.data.copy_(sinusoids(a.positions + 2, a.width, a.posstd))
    if a.tokstd: torch.nn.init.normal_(lm.tokens.weight, std=a.tokstd)
    for b in lm.blocks:
        for lin in (b.attention.out, b.mlp.down): lin.weight.data.mul_(a.res)
        for lin in (b.attention.query, b.attention.key): lin.weight.data.mul_(a.qk)
    for n, p in lm.named_parameters():
        if n.endswith('bias') and a.zerobias: p.data.zero_()
    return lm

class Told:
    """Held-out scenes told in text; questions one by one, and captions."""
    def __init__(self, n=200, seed='held out'):
        rng = random.Random(seed)
        self.items, self.caps = [], []
        for _ in range(n):
            s = fast_scene(rng)
            key = keywords(s, rng, full=True)[0]
            cap = caption(s, 'positions', rng)[0], caption(s, 'size', rng)[0]
            two = f'{cap[0]}|{cap[1]}' + ('' if 'background' in ''.join(cap) else '|' + caption(s, 'background', rng)[0])
            for name, told in (('key', key), ('cap', two)):
                ctx = [TOK.end]
                for t in told.split('|'): ctx += enc(t) + [TOK.end]
                for kind, q, ans in questions(s, rng):
                    self.items.append((name, kind, ctx + enc('question ' + q + ' answer'), enc(ans) + [TOK.end]))
                self.caps.append((name, ctx, s))
    @torch.no_grad()
    def questions(self, lm, forms=('key', 'cap')):
        lm.eval(); res = {}
        items = sorted((i for i in self.items if i[0] in forms), key=lambda i: len(i[2]))
        for k in range(0, len(items), 100):
            some = items[k:k + 100]
            rows = [c + ans for _, _, c, ans in some]
            ids, m = TOK.pad(rows)
            top = lm.head(lm(lm.embed(ids), masks.causal(m))).argmax(-1)
            for r, (name, kind, c, ans) in enumerate(some):
                right = all(int(top[r, len(c) - 1 + j]) == x for j, x in enumerate(ans))  # teacher forced: equals greedy when all right
                res.setdefault((kind, name), []).append(right)
        lm.train()
        kinds = dict.fromkeys(k for k, _ in res)
        return {k: '/'.join(f'{100*np.mean(res[k, f]):.1f}' for f in forms) for k in kinds}
    @torch.no_grad()
    def captions(self, lm, n=200):
        lm.eval()
        out = {}
        for form in ('key', 'cap'):
            caps = [c for c in self.caps if c[0] == form][:n]
            for what, prompt in dict(things='a picture of', positions='this picture shows', relations='we see', size='there is').items():
                verdict = []
                for k in range(0, len(caps), 50):
                    rows = [c + enc(prompt) for _, c, _ in caps[k:k + 50]]
                    done = [False] * len(rows); texts = [[] for _ in rows]
                    for _ in range(30):
                        ids, m = TOK.pad([r + t for r, t in zip(rows, texts)])
                        last = m.sum(1) - 1
                        h = lm(lm.embed(ids), masks.causal(m))[torch.arange(len(rows)), last]
                        for r, x in enumerate(lm.head(h).argmax(-1).tolist()):
                            if not done[r]:
                                if x == TOK.end: done[r] = True
                                else: texts[r].append(x)
                        if all(done): break
                    verdict += [judge(prompt + ' ' + TOK.backend.decode(t), c[2]) for t, c in zip(texts, caps[k:k + 50])]
                some = [v[what] for v in verdict if v[what] is not None]
                out[f'{what}/{form}'] = f'{100*np.mean(some):.1f} ({len(some)})' if some else '-'
                if what != 'things':
                    some = [v[what] for v in verdict if v[what] is not None and v['things']]
                    out[f'{what}|things/{form}'] = f'{100*np.mean(some):.1f} ({len(some)})' if some else '-'
        lm.train()
        return out

def rate(s, a):
    if s < a.warmup: return (s + 1) / a.warmup
    left = (a.steps - s) / max(1, a.decay * a.steps)
    return min(1., max(.02, left))

def trial(a):
    lm, rows, told = make_lm(a), Rows(a), Told(a.neval)
    if a.load: lm.load_state_dict(torch.load(a.load))
    mats = [p for p in lm.parameters() if p.ndim > 1]; rest = [p for p in lm.parameters() if p.ndim < 2]
    opt = torch.optim.AdamW([dict(params=mats, weight_decay=a.wd), dict(params=rest, weight_decay=0.)], lr=a.lr, betas=(.9, a.beta2), fused=True)
    auxh = torch.nn.Linear(a.width, len(TOK) * a.back); opt.add_param_group(dict(params=auxh.parameters(), weight_decay=0.))
    store = []; hook = lm.blocks[0].register_forward_hook(lambda m, i, o: store.append(o))
    t0, tdata, teval, sums = time.time(), 0, 0, []
    log = []
    for s in range(a.steps):
        for g in opt.param_groups: g['lr'] = a.lr * rate(s, a)
        t1 = time.time(); ids, w, m = rows.batch(s); tdata += time.time() - t1
        hid = lm(lm.embed(ids), masks.causal(m))
        keep = w[:, 1:] > 0
        ce = F.cross_entropy(lm.head(hid[:, :-1][keep]), ids[:, 1:][keep], reduction='none')
        ww = w[:, 1:][keep]
        if s < a.simple_until: ww = torch.where(ww == a.wans, ww, a.wtext0 * ww)
        loss = (ce * ww).sum() / ww.sum()
        x1 = store.pop(); store.clear()
        if a.aux and s < a.auxuntil:
            for j in range(1, a.back + 1):
                seen = m[:, j:]
                loss = loss + a.aux * F.cross_entropy(auxh(x1[:, j:][seen]).unflatten(-1, (a.back, -1))[:, j - 1], ids[:, :-j][seen])
        opt.zero_grad(); loss.backward(); torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.); opt.step()
        sums.append([loss.item(), (ce[ww == a.wans].mean().item() if (ww == a.wans).any() else 0.)])
        if (s + 1) % a.every == 0 or s + 1 == a.steps:
            t1 = time.time(); acc = told.questions(lm); store.clear(); teval += time.time() - t1
            print(s + 1, f'{time.time()-t0-teval:.0f}s data {tdata:.0f}s len {ids.shape[1]}', 'cpu %.0f' % time.process_time(), 'loss %.3f ans %.3f' % tuple(np.mean(sums[-a.every:], 0)), acc, flush=True)
        if (s + 1) % 300 == 0: torch.save(lm.state_dict(), f'{a.name}.pt')
        if a.seconds and time.time() - t0 - teval > a.seconds: break
    sec = time.time() - t0 - teval
    caps = told.captions(lm) if a.caps else {}
    print('captions', caps, flush=True)
    hook.remove(); torch.save(lm.state_dict(), f'{a.name}.pt')
    with open('log.md', 'a') as f:
        f.write(f'\n## {a.name}\n{" ".join(sys.argv[1:])}\n{s+1} steps, {sec:.0f} s (data {tdata:.0f})\nlast: {acc}\ncaptions told in text: {caps}\n')

def arguments(argv=None):
    p = argparse.ArgumentParser()
    for k, v in dict(name='t', steps=1500, bs=64, lr=2e-3, warmup=100, decay=.3, wd=.01, beta2=.98, layers=3, width=128, heads=4, positions=256, pos='fast', posstd=.05,
                     tokstd=.05, seed=0, two_until=0, simple_until=0, copy_until=0, wtext=1., wq=.1, wans=5., pkey=.5, pblind=0.05, nq=6, ncap=0, every=250, neval=150, seconds=0, only='', load='', caps=0, res=.3, qk=1., zerobias=1, plain_until=0, pcopy=0., aux=.3, back=1, wtext0=.3, relcap=1, asym_until=0, pkeymix=0., mlp=0, rel=1, rel_from=0, auxuntil=99999).items():
        p.add_argument('--' + k, type=type(v), default=v)
    return p.parse_args(argv)

if __name__ == '__main__':
    trial(arguments())
