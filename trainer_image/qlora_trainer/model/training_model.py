"""The model that is trained: a frozen base in NF4, a bfloat16 LoRA adapter, and the way from tokens to loss.

Rules:

- Saved adapters are copied into the existing parameters, which keep their type.
- Only decoder layers up to `plan.recompute_layers` recompute their activations.
- Layers that `kernels` knows are computed there; the others by transformers and PEFT.
- What this module assumes of an architecture (how logits come from hidden states, that records in one row do not see
  each other) is checked on a few tokens before training (`check`), because a wrong loss looks like a bad dataset.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from orchestrator.api.model_facts import CHOSEN
from orchestrator.api.plan import MemoryPlan
from qlora_trainer.data.micro_batch import MicroBatch, StepInputs
from qlora_trainer.kernels import flash_attention, ops
from qlora_trainer.kernels.host_offload import HostEmbedding
from qlora_trainer.kernels.moe_experts import NF4Experts, silent_experts
from qlora_trainer.kernels.packed_attention import NAME as PACKED_ATTENTION
from qlora_trainer.kernels.packed_attention import PackedAttention, UnknownAttention
from qlora_trainer.kernels.streamed_layers import StreamedLayers
from qlora_trainer.kernels.takeover import LARGEST_DIFFERENCE, FusedDecoder, draw_seed, fuse
from qlora_trainer.model.adapter import ADAPTER_NAME, saved_parameters
from qlora_trainer.model.attention import own_attention_implementation
from qlora_trainer.model.cuda_graphs import CudaGraphs
from qlora_trainer.model.layer_inputs import layer_inputs_table, look_up_on_host
from qlora_trainer.model.loading import quantized_layers, streamed
from qlora_trainer.model.loss import Head, cross_entropy, record_log_probabilities
from qlora_trainer.model.probe import probe
from qlora_trainer.model.text_part import decoder_of
from qlora_trainer.outcome import UserError
from qlora_trainer.storage.tensors import on_host

log = logging.getLogger(__name__)
LOGITS_TOLERANCE = 0.05
"""Largest relative difference between two bfloat16 ways to the same logits; a wrong way is off by far more."""
LOOKAHEAD_TOLERANCE = 1e-3
"""Of logits before a token that changes: the same sums, for which a kernel may choose another order."""


class TrainingModel:
    """Base and adapter as the training loop sees them: micro-batch in, loss out."""

    def __init__(
        self,
        peft_model: PeftModel,
        plan: MemoryPlan,
        packed_attention: PackedAttention,
        neftune_alpha: float,
    ) -> None:
        self.peft_model = peft_model
        self.base: Any = peft_model.get_base_model()
        self._decoder: Any = decoder_of(self.base)
        if not isinstance(self._decoder, PreTrainedModel):
            raise UserError(f"{type(self.base).__name__} has no decoder that transformers can name; choose another")
        self._head = _head(self.base)
        self.device = self._head.weight.device  # the embeddings may be on the host
        self.attention = packed_attention
        self.separate_because: str | None = None
        """Why records are computed one by one, with transformers' own attention; None where rows are packed."""
        self._plan = plan
        self._neftune_alpha = neftune_alpha
        self._saved = saved_parameters(peft_model)
        self._start: Mapping[str, Tensor] | None = None
        self._streamed = self._streamed_layers()
        self.fused = fuse(
            self._decoder,
            self.base.config.get_text_config(),
            packed_attention,
            adapter_name=ADAPTER_NAME,
            plan=plan,
            device=self.device,
            streamed=self._streamed,
        )
        packed_attention.flash = self._flash_attention()
        if self.fused is None:
            self._go_without_fused_layers()
        if self.attention_implementation != PACKED_ATTENTION:
            self._go_separately(packed_attention.unfit_because or f"it attends with {self.attention_implementation}")
        self._has_layer_inputs = layer_inputs_table(self.base) is not None
        self._host_embedding = self._offloaded_embedding() if "embeddings" in plan.offload else None
        self.cuda_graphs = self._make_cuda_graphs()

    @property
    def separate(self) -> bool:
        """Whether records are computed one by one."""
        return self.separate_because is not None

    @property
    def attention_implementation(self) -> str:
        """The name, in transformers, of what computes attention where layers are not taken over."""
        return self.base.config._attn_implementation

    def train(self) -> None:
        """Dropout and noise on."""
        self.peft_model.train()

    def eval(self) -> None:
        """Dropout and noise off."""
        self.peft_model.eval()

    def trainable(self) -> Iterator[tuple[str, Parameter]]:
        """The adapter's parameters under the names that they are saved by, in the model's order."""
        return iter(self._saved.items())

    def adapter(self) -> dict[str, Tensor]:
        """The live adapter as PEFT saves it."""
        return {name: parameter.detach() for name, parameter in self._saved.items()}

    def load_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy saved tensors into the adapter; they must be of exactly this adapter."""
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        own = {name: (parameter.shape, parameter.dtype) for name, parameter in self._saved.items()}
        if shapes != own:
            odd = sorted(name for name in shapes.keys() | own.keys() if shapes.get(name) != own.get(name))
            raise ValueError(f"the saved adapter is not of this model and spec; they differ in {odd[:3]}")
        for name, parameter in self._saved.items():
            parameter.data.copy_(tensors[name])

    def begin_with(self, tensors: Mapping[str, Tensor], *, is_reference: bool) -> None:
        """Take a saved adapter for the one that training begins with; as a reference it is kept in host memory."""
        self.load_adapter(tensors)
        self._start = tensors if is_reference else None

    def loss(self, batch: MicroBatch, *, divisor: float) -> Tensor:
        """Summed cross-entropy of the micro-batch's targets, over `divisor`."""
        inputs = StepInputs.of(batch, draw_seed(), divisor, self.device)
        if self.cuda_graphs is None:
            return self._loss(inputs)
        return self.cuda_graphs.make_room(lambda: self._loss(inputs))

    def accumulate(self, batch: MicroBatch, *, divisor: float, between: Callable[[], None] = lambda: None) -> Tensor:
        """`loss`, whose gradients are added to the adapter's; `between` is called between both passes.

        The loss is good until the next call.
        """
        if self.cuda_graphs is not None and self.cuda_graphs.takes(batch):
            return self.cuda_graphs.run(batch, divisor, between)
        loss = self.loss(batch, divisor=divisor)
        between()
        loss.backward()
        return loss.detach()

    def log_probabilities(self, batch: MicroBatch) -> Tensor:
        """The log-probability of each record's targets together, [records], float32."""
        return self._log_probabilities(StepInputs.of(batch, draw_seed(), 1.0, self.device))

    @torch.no_grad()
    def reference_log_probabilities(self, batch: MicroBatch) -> Tensor:
        """The same of the model that training began with, without noise or dropout; draws nothing."""
        with self.without_adapter() if self._start is None else self._as_it_began(self._start):
            return self._log_probabilities(StepInputs.of(batch, 0, 1.0, self.device))

    def logits(self, batch: MicroBatch) -> Tensor:
        """Float32 logits [tokens, vocabulary] of a micro-batch."""
        return self._head.logits(self._hidden(StepInputs.of(batch, 0, 1.0, self.device))[0])

    @torch.no_grad()
    def likeliest(self, batch: MicroBatch, places: Tensor) -> list[int]:
        """The likeliest next token at each of these places of a micro-batch; draws nothing."""
        inputs = StepInputs.of(batch, 0, 1.0, self.device)
        hidden = (
            self._hidden(inputs)
            if self.cuda_graphs is None
            else self.cuda_graphs.make_room(lambda: self._hidden(inputs))
        )
        found = self._head.logits(hidden[0, places.to(self.device)])
        return [int(token) for token in found.argmax(-1).tolist()]

    def end_training(self) -> None:
        """Leave everything to transformers and PEFT, and let go of gradients and graphs: there is no way back."""
        if self.fused is not None:
            self.fused.give_back()
        self.fused = self.cuda_graphs = None
        for parameter in self._saved.values():
            parameter.grad = None
        if self._host_embedding is not None:
            look_up_on_host(self.base.get_input_embeddings(), self.device)
        self.base.set_attn_implementation(own_attention_implementation(self.base.config))
        self.eval()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def linear_weights(self) -> int:
        """Weights that every token is multiplied with: the quantized layers, its experts and the head."""
        layers = sum(layer.in_features * layer.out_features for layer in quantized_layers(self.base).values())
        config = self.base.config.get_text_config()
        chosen = next((found for name in CHOSEN if (found := getattr(config, name, None))), 0)
        return layers + chosen * sum(each.expert_weights for each in self._experts()) + self._head.weight.numel()

    def _experts(self) -> list[NF4Experts]:
        return [module for module in self.base.modules() if isinstance(module, NF4Experts)]

    def _loss(self, inputs: StepInputs) -> Tensor:
        return cross_entropy(
            self._hidden(inputs).flatten(0, 1),
            inputs.batch.targets.flatten(),
            self._head,
            chunk_tokens=self._plan.loss_chunk_tokens,
            scale=inputs.scale,
            positions=inputs.batch.supervised,
        )

    def _log_probabilities(self, inputs: StepInputs) -> Tensor:
        return record_log_probabilities(
            self._hidden(inputs).flatten(0, 1),
            inputs.batch.targets.flatten(),
            self._head,
            chunk_tokens=self._plan.loss_chunk_tokens,
            positions=inputs.batch.supervised,
            lengths=inputs.host.supervised_by_record(),
        )

    @contextmanager
    def without_adapter(self) -> Generator[None]:
        """The base as it is, without noise or dropout, and back to what was before."""
        was_training, experts = self.peft_model.training, self._experts()
        adapters = [each.adapters for each in experts]
        self.eval()
        for each in experts:  # which compute with theirs themselves, and PEFT does not know of
            each.adapters = {}
        try:
            with self.peft_model.disable_adapter():
                yield
        finally:
            for each, own in zip(experts, adapters, strict=True):
                each.adapters = own
            self.peft_model.train(was_training)

    @contextmanager
    def _as_it_began(self, start: Mapping[str, Tensor]) -> Generator[None]:
        """With the adapter that training began with, and back: what is trained waits in host memory meanwhile, so
        that the card needs no room for a second one."""
        was_training, own = self.peft_model.training, on_host(self.adapter())
        self.eval()
        self.load_adapter(start)
        try:
            yield
        finally:
            self.load_adapter(own)
            self.peft_model.train(was_training)

    def _hidden(self, inputs: StepInputs) -> Tensor:
        batch, on_device = inputs.host, inputs.batch
        self.attention.expect(batch, on_device.record_starts)
        if self.fused is not None:
            self.fused.begin(inputs.seed)
        tokens = self._tokens(batch, on_device)
        if self.separate:
            states = self._record_by_record(tokens, batch)
        else:
            output = self._decoder(**tokens, position_ids=on_device.position_ids, use_cache=False)
            states = output.last_hidden_state
        return states.to(self._head.weight.dtype)  # some architectures end in float32

    def _record_by_record(self, tokens: Mapping[str, Tensor], batch: MicroBatch) -> Tensor:
        """The hidden states of records that never meet: positions begin anew, whatever table holds them."""
        states: list[Tensor] = []
        for start, end in pairwise(batch.record_starts.tolist()):
            record = {name: each[:, start:end] for name, each in tokens.items()}
            states.append(self._decoder(**record, use_cache=False).last_hidden_state)
        return torch.cat(states, dim=1)

    def _tokens(self, batch: MicroBatch, on_device: MicroBatch) -> dict[str, Tensor]:
        """What the decoder is called with: token ids, or what was looked up for them."""
        noisy = self._neftune_alpha > 0 and self.peft_model.training
        if not noisy and not self._has_layer_inputs and self._host_embedding is None:
            return {"input_ids": on_device.input_ids}
        embedded = self._embedded(batch, on_device)
        found = {"inputs_embeds": self._with_noise(embedded, on_device) if noisy else embedded}
        if self._has_layer_inputs:
            found["per_layer_inputs"] = self._decoder.get_per_layer_inputs(batch.input_ids, None)
        return found

    def _embedded(self, batch: MicroBatch, on_device: MicroBatch) -> Tensor:
        if self._host_embedding is not None:
            return self._host_embedding(batch.input_ids)
        return self.base.get_input_embeddings()(on_device.input_ids)

    def _with_noise(self, embedded: Tensor, batch: MicroBatch) -> Tensor:
        """NEFTune (Jain et al., 2023, algorithm 1): uniform noise of alpha / sqrt(record length x width)."""
        lengths = batch.record_starts.diff().repeat_interleave(batch.record_starts.diff(), output_size=batch.tokens)
        size = self._neftune_alpha / (lengths * embedded.shape[-1]).sqrt()
        return embedded + torch.empty_like(embedded).uniform_(-1, 1) * size[None, :, None].to(embedded.dtype)

    def _go_without_fused_layers(self) -> None:
        if self._streamed is not None:
            raise UserError(
                f"the plan streams {self._streamed.count} layers from the host, and the layers of "
                f"{type(self.base).__name__} cannot be computed by hand here, which that takes; use a larger card"
            )
        self.fused = self.cuda_graphs = self.attention.flash = None
        if "activations" in self._plan.offload or self._plan.offloaded_layers:
            log.warning("the activations stay on the card: only layers that are computed by hand can do without them")
        set_recompute(self._decoder, self._plan.recompute_layers + self._plan.offloaded_layers)

    def _flash_attention(self) -> flash_attention.FlashAttention | None:
        """The package's kernels, where the plan asks for them and they run."""
        if self.fused is None or self._plan.attention == "own":
            return None
        heads = self.fused.heads
        return flash_attention.usable(self.device, heads.queries, heads.keys, heads.size)

    def _make_cuda_graphs(self) -> CudaGraphs | None:
        """CUDA graphs, where everything between tokens and gradients runs on the card and draws nothing there."""
        from_host = self._plan.offload or self._plan.offloaded_layers or self._streamed is not None
        if self.fused is None or from_host or self._neftune_alpha > 0 or not ops.can_be_captured(self.device):
            return None
        return CudaGraphs(list(self._saved.values()), self._loss, draw_seed)

    def _streamed_layers(self) -> StreamedLayers | None:
        found = streamed(self.base)
        asked = min(self._plan.streamed_layers, self.base.config.get_text_config().num_hidden_layers)
        if (0 if found is None else found.count) != asked:
            raise ValueError(f"the plan streams {asked} layers from the host; the base was loaded for another plan")
        return found

    def _offloaded_embedding(self) -> HostEmbedding | None:
        table = self.base.get_input_embeddings()
        if table.weight.data_ptr() == self._head.weight.data_ptr():
            log.info("the embeddings stay on the card: the head shares them")
            return None
        if type(table) is not torch.nn.Embedding:  # some architectures scale what they look up
            log.warning("the embeddings stay on the card: %s may do more than look up", type(table).__name__)
            return None
        return HostEmbedding(table, self.device)

    # --- does the architecture work the way that this module assumes?

    @torch.no_grad()
    def check(self) -> None:
        """Compare loss path and packing with the model's own logits on a few tokens; raise UserError if they differ."""
        self.eval()
        name = type(self.base).__name__
        first, second = range(1, 6), range(6, 13)
        try:
            if self.fused is not None:
                with silent_experts(self.base):  # for a rounding, a token would go to another expert
                    self._check_fused_layers(self.fused, probe(first, second))
            if not self.separate and not self._records_are_apart():
                self._go_separately("records of a packed row see each other")
        except UnknownAttention as error:
            self._go_separately(str(error))
        if not bool(self.logits(probe(first)).isfinite().all()):
            raise UserError(
                f"{name} answers a few tokens with what is no number (NaN): it cannot be trained; get its weights anew"
            )
        if not self._records_are_apart():
            raise UserError(f"{name} lets records see each other, so it cannot be trained here")
        if self._looks_ahead():
            raise UserError(f"{name} sees the text to its right, so it is no causal language model; choose another")
        batch = probe(first)
        with self.fused.bypassed() if self.fused is not None else nullcontext():
            on_device = batch.to(self.device)
            tokens = {"input_ids": on_device.input_ids}
            if self._host_embedding is not None:
                tokens = {"inputs_embeds": self._embedded(batch, on_device)}
            ours, theirs = self.logits(batch), self.base(**tokens, use_cache=False).logits[0].float()
        if not _same(ours, theirs):
            raise UserError(
                f"{name} makes its logits in a way that the trainer does not know, so its loss would be wrong"
            )

    def _records_are_apart(self) -> bool:
        """Whether a record's logits are the same whatever record stands before it."""
        second = range(6, 13)
        with silent_experts(self.base):
            after_first, after_other = (self.logits(probe(first, second))[5:] for first in (range(1, 6), range(21, 26)))
        return torch.equal(after_first, after_other)  # the same shapes, so the same sums: not a bit may differ

    def _looks_ahead(self) -> bool:
        """Whether the last token changes the logits before it."""
        with silent_experts(self.base):
            ours, theirs = (self.logits(probe([*range(1, 8), last]))[:-1] for last in (8, 20))
        return bool((ours - theirs).norm() > LOOKAHEAD_TOLERANCE * ours.norm())

    def _go_separately(self, reason: str) -> None:
        """From here on each record is computed alone, which is slower and right whatever the architecture does."""
        log.warning(
            "%s is trained record by record, with transformers' own attention: %s", type(self.base).__name__, reason
        )
        if self.fused is not None:
            self.fused.give_back()
            self._go_without_fused_layers()
        self.base.set_attn_implementation(own_attention_implementation(self.base.config))
        self.separate_because = reason

    def _check_fused_layers(self, fused: FusedDecoder, batch: MicroBatch) -> None:
        """Hold each layer against the untouched one; go back to those if one is off."""
        with fused.compared() as differences:
            self._hidden(StepInputs.of(batch, 0, 1.0, self.device))
        odd = [layer for layer, difference in enumerate(differences) if not difference <= LARGEST_DIFFERENCE]
        if odd:
            log.warning(
                "the layers run as transformers and PEFT compute them: layer %d is off by %.2g in ours, which is more "
                "than rounding; please report the model",
                odd[0],
                differences[odd[0]],
            )
            fused.give_back()
            self._go_without_fused_layers()


def _same(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).norm() <= LOGITS_TOLERANCE * other.norm())


def _head(base: PreTrainedModel) -> Head:
    """The head, with what some architectures do to its logits; `TrainingModel.check` finds the ones that do more."""
    head: Any = base.get_output_embeddings()
    config = base.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None)
    factor = getattr(config, "logit_scale", None)
    return Head(
        weight=head.weight,
        bias=getattr(head, "bias", None),
        scale=1 / divisor if divisor else factor or 1.0,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


def set_recompute(decoder: torch.nn.Module, layers: int) -> None:
    """Make the first so many decoder layers recompute their activations in the backward pass."""
    own: list[Any] = [layer for layer in decoder.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if layers > 0 and not own:
        raise UserError(f"{type(decoder).__name__} has no layers that can recompute; set recomputeLayers to 0")
    for index, layer in enumerate(own):
        layer.gradient_checkpointing = index < layers
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # its own interface, per layer
