"""The loss against F.cross_entropy on the logits of all positions, and against transformers' own."""

import pytest
import torch
import torch.nn.functional as F
from helpers.training import LLAMA, VOCABULARY, random_rows, tiny_base, tiny_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from minilora.adapters.attach import add_adapter, disable_adapters
from minilora.adapters.for_training import adapter_parameters
from minilora.adapters.lora_config import LoRAConfig
from minilora.adapters.mixed_batch import adapters_for_rows
from minilora.data.batches import collate, pack
from minilora.data.examples import Example
from minilora.errors import InputError
from minilora.models.config import ModelConfig
from minilora.models.transformer import Transformer
from minilora.nf4.linear import NF4Linear
from minilora.training import loss as loss_module
from minilora.training.loss import held_out_loss, label_tokens, linear_cross_entropy, summed_cross_entropy, summed_loss

N, HIDDEN = 10, 12


@pytest.fixture(params=[(1, 1), (4, VOCABULARY), (4, 2**20), (64, 2**20)], ids=str)
def chunk(request, monkeypatch):
    rows, elements = request.param
    monkeypatch.setattr(loss_module, "ROWS_AT_ONCE", rows)
    monkeypatch.setattr(loss_module, "CACHE_ELEMENTS", elements)


def logits_and_targets(dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(N, VOCABULARY, generator=random)
    return logits.to(dtype).requires_grad_(), torch.randint(0, VOCABULARY, (N,), generator=random)


@pytest.mark.usefixtures("chunk")
def test_cross_entropy_equals_torch():
    logits, targets = logits_and_targets()
    expected = F.cross_entropy(logits, targets, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected / 7, logits)
    loss = summed_cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(loss / 7, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # 10 float32 terms in another order
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-8)  # exp(z − log Z): some float32 ulps


def test_bfloat16_is_summed_in_float32_and_its_gradient_rounded_once_and_scaled():
    logits, targets = logits_and_targets(torch.bfloat16)
    exact = logits.detach().double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected / 7, exact)
    loss = summed_cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad(loss / 7, logits)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    # rounded to 8 significant bits, then divided by 7 and rounded again: at most half an ulp, 2^-8, each
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2**-7, atol=1e-9)


# --- through the head -------------------------------------------------------------------------------------------------


def dense_head(bias=False, trained=False):
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias)
    nn.init.normal_(head.weight)
    return head.requires_grad_(trained)


def adapted_head(head=None, **config):
    parent = nn.ModuleDict({"body": nn.Linear(2, 2), "lm_head": head or dense_head()})
    add_adapter(parent, LoRAConfig(**({"r": 3, "target_modules": ["lm_head"]} | config)))
    with torch.no_grad():
        for parameter in parent.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))  # B is not zero, nor the copy that of before
    return parent["lm_head"]


def hooked_head():
    head = dense_head()
    head.scale = torch.ones((), requires_grad=True)  # of the hook alone: no parameter of the head
    head.register_forward_hook(lambda module, args, y: y * module.scale)
    return head


HEADS = {
    "frozen": dense_head,
    "trained": lambda: dense_head(bias=True, trained=True),
    "bias": lambda: dense_head(bias=True),
    "NF4": lambda: NF4Linear.from_linear(dense_head()),
    "LoRA": adapted_head,
    "LoRA on NF4": lambda: adapted_head(NF4Linear.from_linear(dense_head())),
    "DoRA": lambda: adapted_head(use_dora=True),
    "a copy": lambda: adapted_head(target_modules=["body"], modules_to_save=["lm_head"]),
    "a hook": hooked_head,
}


def hidden_and_targets(dtype=torch.float32):
    random = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, HIDDEN, generator=random)
    return hidden.to(dtype).requires_grad_(), torch.randint(0, VOCABULARY, (N,), generator=random)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("head", HEADS)
def test_through_any_head_it_is_that_of_all_its_logits(head):
    torch.manual_seed(0)
    head = HEADS[head]()
    hidden, targets = hidden_and_targets()
    inputs = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    if hasattr(head, "scale"):
        inputs.append(head.scale)
    expected = F.cross_entropy(head(hidden), targets, reduction="sum")
    expected_gradients = torch.autograd.grad(expected / 7, inputs)
    loss = linear_cross_entropy(hidden, head, targets)
    gradients = torch.autograd.grad(loss / 7, inputs)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)  # 10 float32 terms in another order
    for gradient, like in zip(gradients, expected_gradients, strict=True):
        # float32 sums in another order, relative to the largest entry
        torch.testing.assert_close(gradient, like, rtol=0, atol=2e-6 * like.abs().max().item())


def test_gradients_are_right_by_finite_differences(monkeypatch):
    monkeypatch.setattr(loss_module, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(loss_module, "CACHE_ELEMENTS", 7)
    random = torch.Generator().manual_seed(0)
    head = nn.Linear(3, 7).double()
    hidden = torch.randn(5, 3, dtype=torch.float64, generator=random, requires_grad=True)
    logits = torch.randn(5, 7, dtype=torch.float64, generator=random, requires_grad=True)
    targets = torch.tensor([0, 6, 2, 2, 5])
    inputs = (hidden, head.weight, head.bias)
    assert torch.autograd.gradcheck(lambda h, *_: linear_cross_entropy(h, head, targets), inputs)
    assert torch.autograd.gradcheck(lambda z: summed_cross_entropy(z, targets), logits)


def test_a_bfloat16_head_against_float64():
    head = dense_head().to(torch.bfloat16)
    hidden, targets = hidden_and_targets(torch.bfloat16)
    exact = hidden.detach().double().requires_grad_()
    with torch.no_grad():
        rounding = (head(hidden).double() - exact @ head.weight.double().T).abs().max().item()
    expected = F.cross_entropy(exact @ head.weight.double().T, targets, reduction="sum")
    (expected_gradient,) = torch.autograd.grad(expected, exact)
    loss = linear_cross_entropy(hidden, head, targets)
    (gradient,) = torch.autograd.grad(loss, hidden)
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    # the logits are rounded, and |∂L/∂z| of a row sums to 2 at most; then float32
    assert abs(loss.item() - expected.item()) <= 2 * N * rounding + 1e-5 * expected.item()
    # softmax of such logits errs by a factor of e^(2 rounding); one rounding of it, one of the product
    scale = expected_gradient.abs().max().item()
    assert (gradient.double() - expected_gradient).abs().max().item() <= (2 * rounding + 2**-7) * scale


def test_a_hook_on_a_parameter_sees_its_gradient_once():
    head = dense_head(trained=True)
    hidden, targets = hidden_and_targets()
    (expected,) = torch.autograd.grad(linear_cross_entropy(hidden, head, targets), head.weight)
    head.weight.register_hook(lambda gradient: 3 * gradient)
    (gradient,) = torch.autograd.grad(linear_cross_entropy(hidden, head, targets), head.weight)
    torch.testing.assert_close(gradient, 3 * expected, rtol=1e-5, atol=1e-6)  # float32 sums in another order


def test_no_gradient_where_nothing_trains():
    head, targets = adapted_head(), hidden_and_targets()[1]
    parent = nn.ModuleDict({"lm_head": head})
    hidden = hidden_and_targets()[0].detach()
    assert linear_cross_entropy(hidden, head, targets).requires_grad
    with disable_adapters(parent):
        assert not linear_cross_entropy(hidden, head, targets).requires_grad


# --- what it costs ----------------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """The largest tensor that any operation gives, in numbers, and how many matrix products there are."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor._base is None:
                self.largest = max(self.largest, tensor.numel())
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return result


@pytest.mark.parametrize("tied", [True, False])
def test_the_logits_of_all_positions_never_exist(monkeypatch, tied):
    monkeypatch.setattr(loss_module, "ROWS_AT_ONCE", 4)
    model = tiny_model().requires_grad_(False)
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone(), requires_grad=False)
    hidden = torch.randn(100, LLAMA["hidden_size"], requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (100,))
    with Watch() as whole:
        F.cross_entropy(model.lm_head(hidden), targets).backward()
    with Watch() as chunked:
        linear_cross_entropy(hidden, model.lm_head, targets).backward()
    assert whole.largest == 100 * VOCABULARY
    assert chunked.largest == hidden.numel() < whole.largest, "the hidden states' gradient is the largest"


def test_backward_only_scales_and_evaluation_takes_no_gradient(monkeypatch):
    monkeypatch.setattr(loss_module, "ROWS_AT_ONCE", 5)
    head = dense_head()
    hidden, targets = hidden_and_targets()
    with Watch() as forward:
        loss = linear_cross_entropy(hidden, head, targets)
    with Watch() as backward:
        loss.backward()
    with Watch() as evaluation, torch.no_grad():
        assert linear_cross_entropy(hidden, head, targets) == loss
    assert (forward.products, backward.products, evaluation.products) == (4, 0, 2)


@pytest.mark.parametrize("head", [nn.Identity(), nn.Linear(VOCABULARY, VOCABULARY)])
def test_no_row_at_all(head):
    hidden = torch.zeros(0, VOCABULARY, requires_grad=True)
    loss = linear_cross_entropy(hidden, head, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0


# --- of a model -------------------------------------------------------------------------------------------------------


def test_labels_are_predicted_by_the_token_before():
    example = Example([5, 6, 7], [5, -100, 7])  # nothing comes before the first token
    assert label_tokens([example]) == 1
    model = tiny_model().eval()
    logits = model(torch.tensor([[5, 6, 7]]))
    expected = -logits[0, 1].log_softmax(-1)[7]
    torch.testing.assert_close(summed_loss(model, collate([example], 0)), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tied", [True, False])
def test_equal_to_transformers_and_through_a_transformers_model(tied):
    transformers = pytest.importorskip("transformers")
    config = LLAMA | {"tie_word_embeddings": tied}
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).eval()
    model = Transformer(ModelConfig.from_hf(config)).eval()
    model.load_state_dict(reference.state_dict())
    rows = random_rows(6)
    batch = collate(rows, 0)
    mean = reference(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    expected = mean.item() * label_tokens(rows)
    # two implementations of the same float32 forward pass
    assert summed_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)
    assert summed_loss(reference, batch).item() == pytest.approx(expected, rel=1e-6)
    mean.backward()
    (summed_loss(model, batch) / label_tokens(rows)).backward()
    ours, theirs = (dict(each.named_parameters()) for each in (model, reference))
    for name, parameter in ours.items():  # a tied weight has the head's gradient and the embedding's
        # two implementations of the same float32 backward pass, relative to the largest entry
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, rtol=0, atol=1e-5 * theirs[name].grad.abs().max().item()
        )


def whole_loss(logits, batch):
    """Of the logits of all positions, by torch."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")


def test_a_head_that_borrows_the_embeddings_adapter_gives_it_a_gradient():
    model = tiny_base()
    add_adapter(model, LoRAConfig(r=4, target_modules=["lm_head"], ensure_weight_tying=True))
    parameters = list(adapter_parameters(model).values())
    for parameter in parameters:
        nn.init.normal_(parameter, std=0.1)
    batch = pack(random_rows(4))
    expected = whole_loss(model(batch.input_ids, lengths=batch.lengths), batch)
    for hooked in (False, True):
        hook = parameters[0].register_hook(lambda gradient: 3 * gradient) if hooked else None
        gradients = torch.autograd.grad(summed_loss(model, batch), parameters)
        likes = torch.autograd.grad(expected, parameters, retain_graph=True)
        for gradient, like in zip(gradients, likes, strict=True):
            # float32 sums in another order, relative to the largest entry
            torch.testing.assert_close(gradient, like, rtol=0, atol=1e-5 * like.abs().max().item())
    hook.remove()


class Halved(Transformer):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) / 2


def test_what_happens_in_a_call_of_the_model_happens_in_its_loss():
    rows = pack(random_rows(4))
    expected = whole_loss(tiny_base()(rows.input_ids, lengths=rows.lengths) / 2, rows)

    def hooked(model):
        model.register_forward_hook(lambda module, args, logits: logits / 2)

    def wrapped(model):  # as accelerate does
        forward = model.forward
        model.forward = lambda *args, **kwargs: forward(*args, **kwargs) / 2

    def subclass(model):
        model.__class__ = Halved

    def compiled(model):
        subclass(model)
        model.compile(backend=lambda graph, inputs: calls.append(1) or graph.forward)

    calls = []
    for change in (hooked, wrapped, subclass, compiled):
        model = tiny_base()
        change(model)
        # float32 in another order
        torch.testing.assert_close(summed_loss(model, rows), expected, rtol=1e-5, atol=0, msg=change.__name__)
    assert calls


def test_a_wrapper_that_gives_no_logits_is_refused():
    for model in (torch.compile(tiny_base(), backend="eager"), nn.DataParallel(tiny_base())):
        with pytest.raises(InputError, match=f"{type(model).__name__} gives no logits .* give the model inside it"):
            summed_loss(model, collate(random_rows(2), 0))


# --- held-out rows ----------------------------------------------------------------------------------------------------


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


def test_held_out_loss_leaves_every_module_in_its_mode():
    model = tiny_model().train()
    model.model.embed_tokens.eval()
    modes = [module.training for module in model.modules()]
    held_out_loss(model, random_rows(2), 0)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(IndexError):
        held_out_loss(model, [Example([1, VOCABULARY], [1, 1])], 0)
    assert [module.training for module in model.modules()] == modes


def test_held_out_rows_that_have_no_loss():
    with pytest.raises(InputError, match="no row has a token that the loss"):
        held_out_loss(tiny_model(), [Example([5, 6], [5, -100])], 0)
    model = tiny_model()
    with adapters_for_rows(model, ["default", "__base__"]), pytest.raises(InputError, match="must stay in order"):
        held_out_loss(model, random_rows(2), 0)
