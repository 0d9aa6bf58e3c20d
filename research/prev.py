"""How many steps until a head reads the token before? Target at t: ids[t-1]."""
import sys, lab, torch, time, numpy as np, torch.nn.functional as F
from minblip2 import masks
def table(n,d,std,top,bottom):
    f=torch.logspace(np.log10(top),np.log10(bottom),d//2); p=torch.arange(n)[:,None]*f
    t=torch.zeros(n,d); t[:,0::2]=p.sin(); t[:,1::2]=p.cos(); return t*std/.7071
def run(steps=500,lr=3e-3,top=1.,bottom=1e-4,learned=False,L=48,layers=1,seed=0,init=None,**kw):
    a=lab.arguments([]); a.pos='sin'; a.posstd=.05; a.tokstd=.05; a.res=.3; a.zerobias=1; a.width=64; a.layers=layers; a.seed=seed
    for k,v in kw.items(): setattr(a,k,v)
    lm=lab.make_lm(a)
    if not learned: lm.positions.weight.data.copy_(table(258,a.width,a.posstd,top,bottom))
    if init: init(lm)
    opt=torch.optim.AdamW(lm.parameters(),lr=lr,betas=(.9,.98),weight_decay=0.,fused=True)
    t=time.process_time(); acc=[]; hist=[]
    nouns=torch.tensor(lab.NOUNS)
    for s in range(steps):
        for g in opt.param_groups: g['lr']=lr*min(1,(s+1)/50)
        ids=nouns[torch.randint(len(nouns),(16,L))]
        lo=lm.head(lm(lm.embed(ids),masks.causal(torch.ones_like(ids,dtype=torch.bool))))[:,1:]; y=ids[:,:-1]
        loss=F.cross_entropy(lo.flatten(0,1),y.flatten()); acc.append((lo.argmax(-1)==y).float().mean().item())
        opt.zero_grad(); loss.backward(); torch.nn.utils.clip_grad_norm_(lm.parameters(),1.); opt.step()
        if (s+1)%50==0: hist.append(round(100*np.mean(acc[-10:])))
        if len(acc)>10 and np.mean(acc[-10:])>.98: break
    print(dict(lr=lr,top=top,bottom=bottom,learned=learned,L=L,**kw),'steps',s+1,hist,'cpu',round(time.process_time()-t,1),flush=True)
    return lm
if __name__=='__main__':
    for line in sys.argv[1:]: eval(line)
