"""Malicious files are refused in one sentence, quickly, in little memory, and no code is run."""

import io
import pickletools
import subprocess
import sys
import zipfile

import pytest
import torch
from conftest import GOLDEN, TINY, make_model

from cn_clip import weights
from cn_clip.config import MODELS
from cn_clip.errors import CheckpointError
from cn_clip.model.clip import CLIP
from cn_clip.weights.pickles import MAX_OBJECTS, RefusedPickle, check_pickle

HOSTILE = GOLDEN / "hostile"
TOWER = GOLDEN / "towers" / "openai_vit.pt"


def test_hostile_files_are_refused_quickly_without_side_effects(tmp_path):
    deep = (
        b"\x80\x02})" + b"\x85" * 100_000 + b"K\x01s."
    )  # a dict whose key is deeply nested tuples
    with zipfile.ZipFile(tmp_path / "deep_tuple_key.pt", "w") as file:
        file.writestr("archive/data.pkl", deep)
    lines = [
        "import sys; from cn_clip import weights; from cn_clip.errors import CheckpointError",
        "*bad, good = sys.argv[1:]",
        "before = weights.read_tensors(good)",
        "for path in bad:",
        "    try: weights.read(path)",
        "    except CheckpointError as error: assert 'is refused: its pickle' in str(error), error",
        "    else: raise SystemExit(path)",
        "after = weights.read_tensors(good)",
        "assert len(before) == len(after) > 10",
    ]
    bad = [*sorted(HOSTILE.glob("*.pt")), tmp_path / "deep_tuple_key.pt"]
    assert len(bad) == 4
    command = [sys.executable, "-c", "\n".join(lines), *map(str, bad), str(TOWER)]
    subprocess.run(command, check=True, timeout=120)


def test_a_config_of_a_million_layers_is_refused_at_once(tiny_model, tmp_path):
    weights.save_folder(tiny_model, tmp_path / "model")
    config = (HOSTILE / "config_1e6_layers.json").read_bytes()
    (tmp_path / "model" / "config.json").write_bytes(config)
    with pytest.raises(
        CheckpointError, match=r"text\.layers = 1000000, not an integer from 1 to 256"
    ):
        weights.read(tmp_path / "model")


def checked(pickled, size=1000):
    return check_pickle(io.BytesIO(pickled), size=size)


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.", "changes a class"),
        (b"\x80\x02]q\x00]h\x00ah\x00K\x01a.", "changes a class, or an object inside another"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "impossible memo index"),
        (
            b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
            r"names __builtin__\.bytearray",
        ),
        (b"\x80\x02ctorch\nTensor\nJ\xff\xff\xff\x7f\x85R.", r"names torch\.Tensor"),
        (
            b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x08\0\0\0punycode\x86R.",
            r"names _codecs\.encode",
        ),
        (b"\x80\x022.", "opcode DUP"),
        (b"\x80\x02X\x07\0\0\0storageN" + b"NNJ\xff\xff\xff\x7ft.", "takes|pop|empty"),
        (b"\x80\x02(X\x07\0\0\0storageNNNJ\xff\xff\xff\x7ftQ.", r"declares 2,147,483,647 elements"),
    ],
)
def test_opcodes_that_no_state_dict_needs_are_refused_before_execution(pickled, message):
    with pytest.raises((RefusedPickle, ValueError, IndexError), match=message):
        checked(pickled)


def test_a_shared_object_is_counted_for_every_use():
    doubled = b"\x80\x02)" + b"q\x00h\x00\x86" * 25 + b"."  # 2 ** 25 empty tuples
    with pytest.raises(RefusedPickle, match=f"more than {MAX_OBJECTS:,} objects"):
        checked(doubled)
    with pytest.raises(RefusedPickle, match="deep"):
        checked(b"\x80\x02)" + b"\x85" * 300 + b".")


def test_a_normal_checkpoint_is_far_below_every_limit():
    with torch.device("meta"):
        names = list(CLIP(MODELS["ViT-H-14"]).state_dict())

    def one():
        return torch.zeros(1)

    moments = {i: {"step": one(), "exp_avg": one(), "exp_avg_sq": one()} for i in range(len(names))}
    groups = [{"lr": 1e-4, "betas": (0.9, 0.98), "params": [i]} for i in range(len(names))]
    stream = io.BytesIO()
    torch.save(
        {
            "state_dict": {f"module.{name}": one() for name in names},
            "optimizer": {"state": moments, "param_groups": groups},
        },
        stream,
    )
    with zipfile.ZipFile(stream) as file:
        pickled = file.read("archive/data.pkl")
    assert sum(1 for _ in pickletools.genops(pickled)) < MAX_OBJECTS / 5
    checked(pickled)


@pytest.fixture
def whole(tiny_model, tmp_path):
    torch.save({"state_dict": tiny_model.state_dict()}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def rewritten(path, *, compression=zipfile.ZIP_STORED, change=lambda name: name, twice=False):
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(change(name), content)
        if twice:
            with pytest.warns(UserWarning, match="Duplicate name"):
                file.writestr(next(iter(members)), b"x")


def test_a_compressed_archive_is_refused(whole):
    rewritten(whole, compression=zipfile.ZIP_DEFLATED)  # as in a zip bomb
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        weights.read(whole)


def test_an_archive_with_two_members_of_one_name_is_refused(whole):
    rewritten(whole, twice=True)
    with pytest.raises(CheckpointError, match="members overlap"):
        weights.read(whole)


def test_a_zip_archive_without_weights_is_named(whole):
    rewritten(whole, change=lambda name: name.replace("data.pkl", "notes.txt"))
    with pytest.raises(CheckpointError, match="is a zip archive, but not one of torch"):
        weights.read(whole)


@pytest.mark.parametrize("flag", [1, 0x800])
def test_an_encrypted_member_or_one_with_an_odd_name_is_refused(whole, flag):
    content = bytearray(whole.read_bytes())
    at = content.rindex(b"PK\x01\x02")
    content[at + 8 : at + 10] = flag.to_bytes(2, "little")
    content[at + 46] = 0xFF  # not UTF-8
    whole.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"compressed or encrypted|not a valid"):
        weights.read(whole)


def test_bytes_before_or_after_an_archive_are_refused(whole):
    content = whole.read_bytes()
    for other in (content + b"x", b"PK\x03\x04" + content):
        whole.write_bytes(other)
        with pytest.raises(CheckpointError, match=r"not a valid .pt file"):
            weights.read(whole)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about tensor types
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.zeros(1).expand(64, 32), r"text_projection \[64, 32\] needs 8,192 bytes"),
        (lambda: torch.zeros(1).expand(10**6, 10**6), "needs 4,000,000,000,000 bytes and has 4"),
        (lambda: torch.zeros(64, 32).to_sparse(), "is torch.sparse_coo, not a plain tensor"),
        (lambda: torch.zeros(64, 32, device="meta"), "is on the meta device"),
        (
            lambda: torch.quantize_per_tensor(torch.zeros(64, 32), 1.0, 0, torch.qint8),
            "is quantized, not a plain tensor",
        ),
    ],
)
def test_a_tensor_that_does_not_match_its_storage_is_named(
    tiny_model, tmp_path, make, message, zipped
):
    state = dict(tiny_model.state_dict()) | {"text_projection": make()}
    path = tmp_path / "file.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=message):
        weights.read(path)


def test_tensors_that_share_one_storage_cannot_exceed_the_file(tmp_path):
    model = make_model(TINY["vit"])
    one = torch.zeros(21128 * 64)
    state = {name: one[: t.numel()].view(t.shape) for name, t in model.state_dict().items()}
    state |= {f"bert.extra.{i}": one for i in range(50)}
    torch.save(state, tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match=r"its tensors need [\d,]+ bytes, and it has"):
        weights.read(tmp_path / "file.pt")


def test_joint_or_split_weights_of_impossible_shapes_are_named(tiny_model, tmp_path):
    name = "bert.encoder.layer.0.attention.self.Wqkv.weight"
    for shape in ((), (2, 64), (0, 64)):
        state = dict(tiny_model.state_dict()) | {name: torch.zeros(shape)}
        torch.save(state, tmp_path / "file.pt")
        with pytest.raises(CheckpointError, match="cannot be split in three"):
            weights.read(tmp_path / "file.pt")
    with pytest.raises(CheckpointError, match="not a square grid"):
        weights.resize_positions(torch.zeros(7, 4), 17)
