import lab, torch, time
from minblip2 import masks
a=lab.arguments([]); a.bs=32
rows=lab.Rows(a); lm=lab.make_lm(a)
ids,w,m=rows.batch(0); print(ids.shape, m.float().mean())
import torch.nn.functional as F
def step():
    hid=lm(lm.embed(ids),masks.causal(m)); keep=w[:,1:]>0
    ce=F.cross_entropy(lm.head(hid[:,:-1][keep]),ids[:,1:][keep]); ce.backward()
step()
t=time.process_time(); [step() for _ in range(5)]; print('cpu s/step',(time.process_time()-t)/5)
from torch.profiler import profile
with profile() as p: [step() for _ in range(3)]
print(p.key_averages().table(sort_by='self_cpu_time_total',row_limit=14,max_name_column_width=50))
