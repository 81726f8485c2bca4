"""The loss against F.cross_entropy on whole logits, and against transformers' own."""

import pytest
import torch
import torch.nn.functional as F
from training_helpers import LLAMA, VOCABULARY, random_rows, tiny_model

from minilora import loss as loss_module
from minilora.data import Example, collate
from minilora.loss import held_out_loss, label_tokens, summed_cross_entropy, summed_loss
from minilora.model import ModelConfig, Transformer


@pytest.fixture(params=[1, 3 * VOCABULARY, 2**21], ids=["row by row", "three rows", "all rows"])
def chunk(request, monkeypatch):
    monkeypatch.setitem(loss_module.CHUNK_ELEMENTS, "cpu", request.param)


def logits_and_targets(dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(10, VOCABULARY, generator=random)
    return logits.to(dtype).requires_grad_(), torch.randint(0, VOCABULARY, (10,), generator=random)


@pytest.mark.usefixtures("chunk")
def test_cross_entropy_equals_torch():
    logits, targets = logits_and_targets()
    expected = F.cross_entropy(logits, targets, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected / 7, logits)
    loss = summed_cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(loss / 7, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # 10 float32 terms in another order
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)  # exp(z − log Z): some float32 ulps


@pytest.mark.usefixtures("chunk")
def test_cross_entropy_gradient_is_right_by_finite_differences():
    logits, targets = logits_and_targets(torch.float64)
    assert torch.autograd.gradcheck(lambda z: summed_cross_entropy(z, targets), logits)


def test_bfloat16_is_summed_in_float32_and_its_gradient_rounded_once():
    logits, targets = logits_and_targets(torch.bfloat16)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected / 7, exact)
    loss = summed_cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(loss / 7, logits)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    # one rounding to 8 significant bits: at most half an ulp, 2^-8, with float32's own error beside it
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2**-8 + 1e-5, atol=1e-9)


def test_no_row_at_all():
    loss = summed_cross_entropy(torch.zeros(0, VOCABULARY, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0


def test_labels_are_predicted_by_the_token_before():
    example = Example([5, 6, 7], [5, -100, 7])  # nothing comes before the first token
    assert label_tokens([example]) == 1
    model = tiny_model().eval()
    logits = model(torch.tensor([[5, 6, 7]]))
    expected = -logits[0, 1].log_softmax(-1)[7]
    torch.testing.assert_close(summed_loss(model, collate([example], 0)), expected, rtol=1e-6, atol=0)


def test_equal_to_transformers_and_through_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).eval()
    model = Transformer(ModelConfig.from_hf(LLAMA)).eval()
    model.load_state_dict(reference.state_dict())
    rows = random_rows(6)
    batch = collate(rows, 0)
    mean = reference(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    expected = mean.item() * label_tokens(rows)
    # two implementations of the same float32 forward pass
    assert summed_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)
    assert summed_loss(reference, batch).item() == pytest.approx(expected, rel=1e-6)


def test_held_out_loss_is_a_mean_over_tokens_whatever_the_batches():
    model = tiny_model(dropout=0.5).train()
    rows = random_rows(9)
    total = 0.0
    model.eval()
    for row in rows:
        log_p = model(torch.tensor([row.input_ids])).log_softmax(-1)
        total -= sum(
            log_p[0, i, row.labels[i + 1]].item() for i in range(len(row.labels) - 1) if row.labels[i + 1] >= 0
        )
    model.train()
    for batch_size in (1, 4, 9):
        # float32 sums in another order
        assert held_out_loss(model, rows, 0, batch_size) == pytest.approx(total / label_tokens(rows), rel=1e-5)
    assert model.training, "the model is as it was"
