import sys, lab, torch, random, time, numpy as np, torch.nn.functional as F
from minblip2 import masks
V=lab.VOCAB; C=[V[c] for c in lab.COLOURS]; S=[V[s] for s in lab.SHAPES]
END=lab.TOK.end
def batch(step, bs, fmt, n, q, sides):
    rng=np.random.default_rng([step]); out=[]; w=[]
    for _ in range(bs):
        if fmt=='ind':
            m=int(rng.integers(5,13)); seq=rng.permutation(lab.NOUNS)[:m].tolist(); ids=[END]+seq; x=[0]*len(ids)
            while len(ids)<32:
                k=int(rng.integers(m)); l=int(rng.integers(2,5)); part=seq[k:k+l]
                if len(part)>1: ids+=[END]+part; x+=[0]+[1]*(len(part)-1)+[0]
            ids=ids[:32]; x=x[:32]
        elif fmt=='copy':
            seq=rng.permutation(lab.NOUNS)[:12].tolist(); ids=[END]+seq+[END]+seq; x=[0]*14+[1]*11+[0]
        else:
            cs=rng.permutation(C)[:n].tolist(); ss=rng.permutation(S)[:n].tolist()
            ids=[END]
            for c,s in zip(cs,ss): ids+=[V['a'],c,s,V['and']]
            ids[-1]=END
            x=[0]*len(ids)
            order=rng.integers(len(sides)*n,size=q)
            for k in order:
                side,k=divmod(int(k),n); side=sides[side]
                ask,key,ans=(V['shape'],cs[k],ss[k]) if side=='s' else (V['colour'],ss[k],cs[k])
                if fmt=='mid': ids+=[ask,key,V['answer'],ans]; x+=[0,0,1,0]
                if fmt=='end': ids+=[V['answer'],ask,key,ans]; x+=[0,0,1,0]
                if fmt=='thing': ids+=[V['question'],V['what'],ask,V['is'],V['the'],key]+([V['thing']] if side=='s' else [])+[V['answer'],ans,END]+([END] if side=='c' else []); x+=[0]*(7 if side=='s' else 6)+[1,0,0]+[0]*(side=='c')
                if fmt=='long': ids+=[V['question'],V['what'],ask,V['is'],V['the'],key,V['answer'],ans,END]; x+=[0,0,0,0,0,0,1,0,0]
        out.append(ids); w.append(x)
    return torch.tensor(out), torch.tensor(w).bool()
def run(fmt, steps, lr, n=3, q=4, sides='sc', seed=0, bs=32, dense=0., until=0, aux=.3, back=1, auxuntil=9999, top=2., bottom=.02, lm=None, stop=.98, first='ind', w=None, **kw):
    a=lab.arguments([]); a.pos='sin'; a.posstd=.05; a.tokstd=.05; a.res=.3; a.zerobias=1; a.width=64; a.layers=2; a.seed=seed
    beta2=kw.pop('beta2',.98)
    for k,v in kw.items(): setattr(a,k,v)
    lm=lm or lab.make_lm(a); opt=torch.optim.AdamW(lm.parameters(),lr=lr,betas=(.9,beta2),weight_decay=0.,fused=True)
    from prev import table
    if top: lm.positions.weight.data.copy_(table(258,a.width,a.posstd,top,bottom))
    auxh=torch.nn.Linear(a.width,len(lab.TOK)*back); opt.add_param_group(dict(params=auxh.parameters()))
    store=[]; hook=lm.blocks[0].register_forward_hook(lambda m,i,o: store.append(o))
    t=time.process_time(); acc=[]; hist=[]
    for s in range(steps):
        for g in opt.param_groups: g['lr']=lr*min(1,(s+1)/50)
        k=first if s<until else fmt
        ids,w=batch(s,bs,k,n,q,sides)
        hid=lm(lm.embed(ids),masks.causal(torch.ones_like(ids,dtype=torch.bool)))
        lo=lm.head(hid[:,:-1]); y=ids[:,1:]; w=w[:,:-1]
        l=F.cross_entropy(lo[w],y[w]); loss=l+dense*F.cross_entropy(lo[~w],y[~w]) if dense else l
        x1=store.pop()
        if aux and s<auxuntil:
            for j in range(1,back+1):
                loss=loss+aux*F.cross_entropy(auxh(x1[:,j:]).unflatten(-1,(back,-1))[:,:,j-1].flatten(0,1),ids[:,:-j].flatten())
        if k==fmt: acc.append((lo[w].argmax(-1)==y[w]).float().mean().item())
        opt.zero_grad(); loss.backward(); torch.nn.utils.clip_grad_norm_(lm.parameters(),1.); opt.step()
        if (s+1)%100==0: hist.append(round(100*np.mean(acc[-30:])) if acc else 0)
        if len(acc)>30 and np.mean(acc[-30:])>stop: break
    print(fmt,dict(lr=lr,n=n,q=q,sides=sides,until=until,bs=bs,dense=dense,beta2=beta2,aux=aux,back=back,auxuntil=auxuntil,top=top,**kw),'steps',s+1,'acc',hist,'cpu',round(time.process_time()-t,1),flush=True)
    hook.remove(); return lm
if __name__=='__main__':
    for line in sys.argv[1:]: eval(line)
