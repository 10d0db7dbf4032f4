from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cn_clip.errors import UsageError
from cn_clip.train.loss import Teacher, clip_loss, feature_loss, sigmoid_loss


def unit(rng, *shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, generator=rng, dtype=dtype), dim=-1)


def make_pairs(size, dim=16, seed=0, dtype=torch.float64):
    """Embeddings, some of texts near their images, with a scale and a bias; all leaves."""
    rng = torch.Generator().manual_seed(seed)
    image = unit(rng, size, dim)
    text = F.normalize(image + unit(rng, size, dim), dim=-1)
    values = (image, text, torch.tensor(14.0), torch.tensor(-3.0))
    return [each.to(dtype).requires_grad_() for each in values]


def make_keys(size, kinds, seed=0):
    """Few kinds make many duplicates."""
    return torch.randint(-kinds, kinds, (size, 3), generator=torch.Generator().manual_seed(seed))


def make_teacher(size, seed=0, weight=0.3, dtype=torch.float64):
    rng = torch.Generator().manual_seed(seed + 1)
    return Teacher(unit(rng, size, 7, dtype=dtype), unit(rng, size, 7, dtype=dtype), 20.0, weight)


def belonging(keys, size):
    """What belongs together, in plain Python."""
    if keys is None:
        return torch.eye(size, dtype=torch.float64)
    rows = keys.tolist()
    return torch.tensor(
        [[float(any(x == y for x, y in zip(a, b, strict=True))) for b in rows] for a in rows],
        dtype=torch.float64,
    )


def naive_clip(image, text, scale, keys=None, teacher=None):
    logits = scale * image @ text.T
    together = belonging(keys, len(image)).to(logits)
    targets = together / together.sum(1, keepdim=True)
    by_image, by_text = targets, targets
    if teacher is not None:
        theirs = teacher.logit_scale * teacher.image @ teacher.text.T
        by_image = torch.lerp(targets, theirs.softmax(1), teacher.weight)
        by_text = torch.lerp(targets, theirs.T.softmax(1), teacher.weight)
    return (F.cross_entropy(logits, by_image) + F.cross_entropy(logits.T, by_text)) / 2


def naive_sigmoid(image, text, scale, bias, keys=None):
    signs = 2 * belonging(keys, len(image)).to(image) - 1
    return -F.logsigmoid(signs * (scale * image @ text.T + bias)).sum() / len(image)


def value_and_gradients(loss, inputs):
    value = loss(*inputs)
    return [value, *torch.autograd.grad(3 * value, inputs)]


def assert_same(ours, theirs, **tolerance):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


SIZES = [(1, None), (2, 1), (7, 3), (33, 8), (33, 33), (64, None)]


@pytest.mark.parametrize("kinds", [None, 2, 40, 10**6])
@pytest.mark.parametrize("weight", [None, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("size, chunk", SIZES)
def test_the_loss_and_its_gradients_equal_those_of_the_full_matrix(size, chunk, kinds, weight):
    keys = kinds and make_keys(size, kinds)
    teacher = None if weight is None else make_teacher(size, weight=weight)
    inputs = make_pairs(size)[:3]
    ours = value_and_gradients(
        lambda *x: clip_loss(*x, keys=keys, teacher=teacher, chunk=chunk), inputs
    )
    theirs = value_and_gradients(lambda *x: naive_clip(*x, keys, teacher), inputs)
    assert_same(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kinds", [None, 2, 40])
@pytest.mark.parametrize("size, chunk", SIZES)
def test_the_sigmoid_loss_and_its_gradients_equal_those_of_the_full_matrix(size, chunk, kinds):
    keys = kinds and make_keys(size, kinds)
    inputs = make_pairs(size)
    ours = value_and_gradients(lambda *x: sigmoid_loss(*x, keys=keys, chunk=chunk), inputs)
    theirs = value_and_gradients(lambda *x: naive_sigmoid(*x, keys), inputs)
    assert_same(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("noise", [0.8, 1.2])
def test_float32_is_as_accurate_as_the_full_matrix_in_float32(noise):
    """At the largest scale that training allows; with little noise, the loss is below 0.001."""
    rng = torch.Generator().manual_seed(0)
    image = unit(rng, 300, 32)
    text = F.normalize(image + noise * unit(rng, 300, 32), dim=-1)
    single = [x.float().requires_grad_() for x in (image, text, torch.tensor(100.0))]
    exact = [x.detach().double().requires_grad_() for x in single]
    truth = value_and_gradients(naive_clip, exact)

    def errors(loss):
        found = value_and_gradients(loss, single)
        return [((a - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]

    ours, theirs = errors(lambda *x: clip_loss(*x, chunk=64)), errors(naive_clip)
    assert all(a <= 2 * b + 1e-6 for a, b in zip(ours, theirs, strict=True))


def test_without_duplicates_the_loss_is_torchs_cross_entropy():
    image, text, scale, _ = make_pairs(20)
    logits, labels = scale * image @ text.T, torch.arange(20)
    expected = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(clip_loss(image, text, scale), expected)
    keys = torch.arange(60).reshape(20, 3)
    torch.testing.assert_close(clip_loss(image, text, scale, keys=keys), expected)


def test_the_gradients_are_those_of_finite_differences():
    keys, teacher = make_keys(5, 3), make_teacher(5)
    image, text, scale, bias = make_pairs(5, 4)
    check = partial(torch.autograd.gradcheck, fast_mode=True)
    contrast = partial(clip_loss, keys=keys, teacher=teacher, chunk=2)
    assert check(contrast, (image, text, scale))
    assert check(partial(sigmoid_loss, keys=keys, chunk=2), (image, text, scale, bias))
    assert check(partial(feature_loss, teacher=text), image)


def test_the_loss_of_a_batch_of_one_is_zero():
    image, text, scale, _ = make_pairs(1, dtype=torch.float32)
    found = value_and_gradients(clip_loss, [image, text, scale])
    assert all(bool((each == 0).all()) for each in found)


def test_a_caption_that_occurs_twice_is_not_its_own_negative():
    """Nothing pushes its two embeddings apart, though one image is near them and one is not."""
    image, text, scale, _ = make_pairs(4)
    text = text.detach().clone()
    text[1] = text[0]
    text.requires_grad_()
    keys = torch.tensor([[0, 0, 7], [1, 1, 7], [2, 2, 8], [3, 3, 9]])
    _, _, plain, _ = value_and_gradients(clip_loss, [image, text, scale])
    _, _, keyed, _ = value_and_gradients(lambda *x: clip_loss(*x, keys=keys), [image, text, scale])
    assert not torch.allclose(plain[0], plain[1], rtol=0.1)
    torch.testing.assert_close(keyed[0], keyed[1])


def test_no_gradient_is_computed_without_grad_mode_and_the_value_is_the_same():
    image, text, scale, bias = make_pairs(9)
    with torch.no_grad():
        alone = clip_loss(image, text, scale), sigmoid_loss(image, text, scale, bias)
    assert not any(each.requires_grad for each in alone)
    assert_same(alone, [clip_loss(image, text, scale), sigmoid_loss(image, text, scale, bias)])


def test_half_precision_embeddings_are_compared_in_single_precision():
    image, text, scale, bias = make_pairs(40, dtype=torch.bfloat16)
    keys = make_keys(40, 20)
    wide = [each.detach().float().requires_grad_() for each in (image, text, scale, bias)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = value_and_gradients(lambda *x: clip_loss(*x, keys=keys), [image, text, scale])
        others = value_and_gradients(sigmoid_loss, [image, text, scale, bias])
    assert [each.dtype for each in ours] == [torch.float32] + 3 * [torch.bfloat16]
    theirs = value_and_gradients(lambda *x: naive_clip(*x, keys), wide[:3])
    torch.testing.assert_close(ours[0], theirs[0])
    assert_same(ours[1:], [each.bfloat16() for each in theirs[1:]], rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(others[0], naive_sigmoid(*wide))


def test_features_that_agree_with_the_teachers_have_no_loss():
    x = make_pairs(6)[0]
    assert feature_loss(3 * x, x).item() == pytest.approx(0, abs=1e-12)
    assert feature_loss(-x, x).item() == pytest.approx(2)


class Largest(TorchDispatchMode):
    """The greatest number of elements that the memory of a tensor holds."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):
                storage = each.untyped_storage().nbytes() // each.element_size()
                self.elements = max(self.elements, storage)
        return result


@pytest.mark.parametrize("kinds", [None, 1, 80])
def test_the_full_matrix_is_never_allocated(kinds):
    size, dim, chunk = 160, 16, 16
    inputs = make_pairs(size, dim)
    keys, teacher = kinds and make_keys(size, kinds), make_teacher(size)
    with Largest() as ours:
        clip_loss(*inputs[:3], keys=keys, teacher=teacher, chunk=chunk).backward()
        sigmoid_loss(*inputs, keys=keys, chunk=chunk).backward()
    with Largest() as theirs:
        naive_clip(*inputs[:3]).backward()
    assert theirs.elements == size * size
    assert ours.elements <= size * max(dim, chunk)


def test_inputs_of_different_shapes_are_named():
    image, text, scale, _ = make_pairs(4)
    with pytest.raises(UsageError, match=r"\(4, 16\) and text embeddings \(3, 16\)"):
        clip_loss(image, text[:3], scale)
    with pytest.raises(UsageError, match="3 keys for 4 pairs"):
        clip_loss(image, text, scale, keys=make_keys(3, 3))
    with pytest.raises(UsageError, match="without pairs"):
        clip_loss(image[:0], text[:0], scale)
    with pytest.raises(UsageError, match="teacher has"):
        clip_loss(image, text, scale, teacher=make_teacher(5))
    with pytest.raises(UsageError, match="weight is 2"):
        make_teacher(4, weight=2)
    with pytest.raises(UsageError, match=r"project the student's"):
        feature_loss(image, text[:, :3])
