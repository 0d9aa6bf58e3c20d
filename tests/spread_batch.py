"""What each of several processes computes of its part of a batch, started by torchrun; process 0 writes it down.

python -m torch.distributed.run --standalone --nproc-per-node=2 -m tests.spread_batch FILE
"""

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from minblip2 import Stage1
from minblip2.data.progress import forgiving_output
from minblip2.data.tokenizer import Tokenizer
from minblip2.lm.opt import OPT, OPTConfig
from minblip2.stage2 import Stage2
from minblip2.training.distributed import DistributedBatch, over_processes, process_group, rank_and_size
from minblip2.training.loop import TrainConfig
from minblip2.training.stages import train_stage1
from tests.parity import TINY, randomise

LENGTHS = (5, 7, 3, 6, 4, 8, 5)  # of 7 texts: two processes hold 3 and 4, three hold 2, 2 and 3


def whole_batch(lengths=LENGTHS):
    """image, ids, mask, image_ids; pictures 1 and 3 have captions in two parts of the batch, and none only here."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(max(lengths) + 1) < torch.tensor(lengths)[:, None]
    ids = torch.randint(3, TINY.vocab_size - 1, mask.shape, generator=generator).masked_fill(~mask, 0)
    ids[:, 0], ids[torch.arange(len(ids)), mask.sum(1) - 1] = 1, 2
    image = torch.randn(len(lengths), 6, TINY.image_width, generator=generator)
    return image, ids, mask, torch.tensor([1, 3, 5, 6, 1, 3, 9])[:len(lengths)]


def stage1():
    model = randomise(Stage1(TINY, embed_dim=16)).train()
    model.temperature.data.fill_(0.3)
    return model


def stage2():
    lm = randomise(OPT(OPTConfig(vocab_size=50, width=24, layers=2, heads=3, mlp_width=40, max_positions=40)))
    return randomise(Stage2.from_stage1(stage1(), lm)).train()


def stage1_step(model, batch, negatives=None):
    """Losses by name; gradients are in the model. Seeded as `train` does, but for what each process draws alone."""
    torch.manual_seed(rank_and_size()[0] * 500_009)
    out = model(*batch, negatives=negatives)
    out.loss.backward()
    return {name: getattr(out, name).detach() for name in ("loss", "itc", "itm", "itg", "itc_logits")}


def stage2_step(model, batch):
    image, ids, mask, _ = batch
    loss = model(image, ids[:, :1], mask[:, :1], ids[:, 1:], mask[:, 1:]).loss
    loss.backward()
    return {"loss": loss.detach()}


def spread(model):
    """The model as the training loop calls it in a process group."""
    return DistributedDataParallel(over_processes(model))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def own_part(batch):
    rank, size = rank_and_size()
    return [part[len(part) * rank // size:len(part) * (rank + 1) // size] for part in batch]


def synchronised(wrapped, step):
    """How many numbers the processes add up in a step."""
    counted = []

    def hook(state, bucket):
        counted.append(bucket.buffer().numel())
        dist.all_reduce(bucket.buffer())
        future = torch.futures.Future()
        future.set_result(bucket.buffer() / dist.get_world_size())
        return future

    wrapped.register_comm_hook(None, hook)
    step(wrapped)
    return sum(counted)


def on_own_features():
    """The losses of three steps of `train_stage1`, in however many processes."""
    torch.manual_seed(0)
    words = Tokenizer.from_texts(["a dog on the grass", "red bus one two three"])
    model = Stage1.for_features(12, words, width=24, layers=1, heads=2, mlp_width=32, num_queries=3, max_positions=16,
                                dropout=0.0)
    captions = ["a dog", "red bus", "grass on", "dog bus", "the grass", "one two three"]
    log = train_stage1(model, torch.randn(6, 5, 12), captions, TrainConfig(steps=3, batch_size=6, precision="float32"))
    return [record["loss"] for record in log]


def main(file):
    found, batch = {}, whole_batch()
    given = torch.tensor([3, 2, 6, 0, 1, 2, 5]), torch.tensor([2, 0, 4, 5, 6, 3, 1])
    with process_group(torch.device("cpu")):
        part = own_part(batch)
        for name, model, step in (("stage1", stage1(), stage1_step), ("stage2", stage2(), stage2_step),
                                  ("given", stage1(), lambda *inputs: stage1_step(*inputs, negatives=given))):
            values = step(spread(model), part)
            everywhere = [None] * rank_and_size()[1]
            dist.all_gather_object(everywhere, (values, gradients(model)))
            found[name] = everywhere
        model = stage1()
        stage1_step(spread(model), [*part[:3], None])  # every image its own
        found["no ids"] = gradients(model)
        model = stage2()
        found["synchronised"] = (synchronised(spread(model), lambda model: stage2_step(model, part)),
                                 sum(p.numel() for p in model.parameters() if p.requires_grad))
        # Only what is chosen travels.
        sent, original = [], dist.all_to_all_single

        def count(got, rows, *sizes):
            sent.append(len(rows))
            original(got, rows, *sizes)

        group, dist.all_to_all_single = DistributedBatch(part[0]), count
        wanted = torch.tensor([6, 6, 6, 6, 5, 0, 6])
        got = group.fetch_rows(part[0], wanted)
        everywhere = [None] * rank_and_size()[1]
        dist.all_gather_object(everywhere, (got, sent[0], group.rows_per_rank))
        found["fetched"] = wanted, everywhere
        found["own features"] = on_own_features()
        if rank_and_size()[0] == 0:
            torch.save(found, file)


if __name__ == "__main__":
    forgiving_output()
    main(sys.argv[1])
