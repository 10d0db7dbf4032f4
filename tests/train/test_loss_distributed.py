"""Several processes against one: the same losses, and the same gradients after DDP's averaging."""

import multiprocessing
import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cn_clip import distributed
from cn_clip.errors import UsageError
from cn_clip.train.loss import Teacher, clip_loss, feature_loss, sigmoid_loss

SHARES = {1: [24], 2: [17, 7], 4: [9, 0, 14, 1]}  # pairs of each rank
CASES = ["plain", "keys", "teacher", "sigmoid", "sigmoid with keys", "features"]


class Towers(nn.Module):
    """The least that is trained: a projection each side, a scale and a bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.visual, self.text = nn.Linear(12, 8), nn.Linear(10, 8)
        self.log_scale, self.bias = (
            nn.Parameter(torch.tensor(2.0)),
            nn.Parameter(torch.tensor(-3.0)),
        )

    def forward(self, pictures, texts):
        image, text = self.visual(pictures), self.text(texts)
        return (
            F.normalize(image, dim=-1),
            F.normalize(text, dim=-1),
            self.log_scale.exp(),
            self.bias.clone(),  # DDP takes no parameter as an output
        )


def batch():
    rng = torch.Generator().manual_seed(1)
    dims = {"pictures": 12, "texts": 10, "their_images": 5, "their_texts": 5, "features": 8}
    made = {n: torch.randn(24, d, generator=rng, dtype=torch.float64) for n, d in dims.items()}
    made["keys"] = torch.randint(30, (24, 3), generator=rng)
    return made


def loss_of(case, outputs, mine):
    image, text, scale, bias = outputs
    keys = mine["keys"] if "keys" in case else None
    if case.startswith("sigmoid"):
        return sigmoid_loss(image, text, scale, bias, keys=keys, chunk=4)
    if case == "features":
        return feature_loss(image, mine["features"])
    teacher = None
    if case == "teacher":
        theirs = (F.normalize(mine[name], dim=-1) for name in ("their_images", "their_texts"))
        teacher, keys = Teacher(*theirs, logit_scale=9.0, weight=0.4), mine["keys"]
    return clip_loss(image, text, scale, keys=keys, teacher=teacher, chunk=4)


def run_cases(count):
    """Return the value and the parameters' gradients of each case."""
    first = sum(SHARES[count][: distributed.rank()])
    mine = {n: x[first : first + SHARES[count][distributed.rank()]] for n, x in batch().items()}
    found = {}
    for case in CASES:
        model = towers = Towers().double()
        if count > 1:
            model = DistributedDataParallel(towers, find_unused_parameters=True)
        value = loss_of(case, model(mine["pictures"], mine["texts"]), mine)
        value.backward()
        found[case] = {n: p.grad for n, p in towers.named_parameters() if p.grad is not None}
        found[case]["value"] = value.detach()
        with torch.no_grad():
            found[case]["value again"] = loss_of(
                case, towers(mine["pictures"], mine["texts"]), mine
            )
    return found


def exchanges():
    """What each function of ``distributed`` returns, on one of several processes."""
    me, floats = distributed.rank(), torch.arange(distributed.rank() * 2.0)[:, None].expand(-1, 3)
    return {
        "main": distributed.is_main(),
        "rows": distributed.all_gather_rows(floats),
        "halves": distributed.all_gather_rows(torch.full((1, 2), me, dtype=torch.bfloat16)),
        "none": distributed.all_gather_rows(torch.ones(0, 2)),
        "sum": distributed.all_reduce_sum(torch.tensor([1.0, me])),
        "max": distributed.all_reduce_max(torch.tensor([-me, me])),
        "broadcast": distributed.broadcast_object({"from": me}),
        "objects": distributed.all_gather_object({"from": me}),
    }


def process(index, count, folder, port):
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    os.environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed.start("cpu"):
        found = {"losses": run_cases(count), "exchanges": exchanges()}
        with pytest.raises(UsageError, match="without pairs"):
            clip_loss(torch.ones(0, 2), torch.ones(0, 2), torch.ones(()))
    assert distributed.world_size() == 1
    torch.save(found, f"{folder}/{index}.pt")


@pytest.fixture(scope="module", params=[2, 4])
def found(request, tmp_path_factory):
    """What each of several processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # Processes are forked from one that has imported torch, which takes longer than all the rest.
    multiprocessing.set_forkserver_preload(["cn_clip.train.loss"])
    torch.multiprocessing.start_processes(
        process, (request.param, folder, port), nprocs=request.param, start_method="forkserver"
    )
    return [torch.load(folder / f"{index}.pt") for index in range(request.param)]


def test_several_processes_end_at_the_loss_and_gradients_of_one(found):
    alone = run_cases(1)
    for of_rank in found:
        for case in CASES:
            ours, theirs = of_rank["losses"][case], alone[case]
            assert theirs.keys() <= ours.keys()
            for name in theirs:
                torch.testing.assert_close(
                    ours[name], theirs[name], rtol=1e-10, atol=1e-12, msg=f"{case}: {name}"
                )


def test_gathered_values_are_in_the_order_of_ranks(found):
    count = len(found)
    rows = torch.cat([torch.arange(rank * 2.0)[:, None].expand(-1, 3) for rank in range(count)])
    for index, each in enumerate(one["exchanges"] for one in found):
        assert each["main"] == (index == 0)
        assert torch.equal(each["rows"], rows)
        assert each["halves"][:, 0].tolist() == list(range(count))
        assert each["none"].shape == (0, 2)
        assert each["sum"].tolist() == [count, count * (count - 1) / 2]
        assert each["max"].tolist() == [0, count - 1]
        assert each["broadcast"] == {"from": 0}
        assert each["objects"] == [{"from": rank} for rank in range(count)]


def test_alone_every_exchange_is_the_identity(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    x = torch.rand(3, 2)
    with distributed.start("cpu"):
        assert not dist.is_initialized()
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        assert distributed.row_counts(x) == [3]
        for function in (
            distributed.all_gather_rows,
            distributed.all_reduce_sum,
            distributed.all_reduce_max,
            distributed.broadcast_object,
        ):
            assert torch.equal(function(x), x)
        assert distributed.all_gather_object("x") == ["x"]


def test_a_start_without_torchrun_names_the_missing_variables(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    said = pytest.raises(UsageError, match=r"RANK.*start several processes with torchrun")
    with said, distributed.start("cpu"):
        pass
