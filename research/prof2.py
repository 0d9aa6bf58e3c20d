import lab, torch, time
from minblip2 import masks
import torch.nn.functional as F
a=lab.arguments([]); a.bs=32
rows=lab.Rows(a); lm=lab.make_lm(a)
b=[rows.batch(i) for i in range(20)]
def step(ids,w,m):
    hid=lm(lm.embed(ids),masks.causal(m)); keep=w[:,1:]>0
    ce=F.cross_entropy(lm.head(hid[:,:-1][keep]),ids[:,1:][keep]); ce.backward()
step(*b[0])
t=time.process_time();t1=time.time(); [step(*x) for x in b]; print('cpu s/step',(time.process_time()-t)/20,'wall',(time.time()-t1)/20, 'tokens',sum(m.sum() for _,_,m in b)/20)
