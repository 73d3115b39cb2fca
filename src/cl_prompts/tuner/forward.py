"""The way of a batch: query -> pool -> prompted pass -> head, through one frozen base model.

While `prompted` is open, the base model's own forward is the prompted pass, and a hook on it replaces what it returns by
`PromptPoolOutput`, whoever calls it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from cl_prompts.backbones.last_block import LastBlock
from cl_prompts.backbones.prefix import PrefixInjector
from cl_prompts.backbones.readout import in_order_noise, take_feature, whole_image
from cl_prompts.backbones.reuse import LowerBlocks
from cl_prompts.backbones.structure import Structure, cls_position_embedding
from cl_prompts.backbones.tokens import TokenInjector
from cl_prompts.interfaces import LossPart, PoolInput, Prompts
from cl_prompts.methods import Observation
from cl_prompts.outputs import PromptPoolOutput
from cl_prompts.tuner.adapter import PoolAdapter
from cl_prompts.tuner.output import Call, Chosen, answer_together, loss_of, masked
from cl_prompts.tuner.validation import check_hidden, check_images, check_labels, check_query, check_ready


# Arguments of the forward that are ours; the base model never sees them while an adapter is active.
OWN_ARGUMENTS = ("labels", "query", "hidden", "sample_ids", "num_items_in_batch")
# What transformers.Trainer, which asks the base's config, is not to gather in an evaluation: all but loss and logits.
NOT_GATHERED = ("losses", "prompt_ids", "prompt_weights", "scores", "query", "features")


class WayOfABatch:
    """The hooks on one base model, and what happens between them.

    Args:
        model: the frozen base.
        structure: where its parts are.

    Attributes:
        tokens: puts prompt tokens in and takes them out.
        prefixes: puts key/value prefixes into blocks.
        installed: whether the base is still this model's; `unload`, or another prompt pool on it, takes it away.
    """

    def __init__(self, model: nn.Module, structure: Structure) -> None:
        self.model = model
        self.structure = structure
        self.tokens = TokenInjector(model, structure)
        self.prefixes = PrefixInjector(model, structure)
        self.last = LastBlock(model, structure, self.tokens, self.prefixes)
        self.lower = LowerBlocks(model, structure)
        self._call: Call | None = None
        self._hooks: list[Any] = []
        self.installed = False
        self._put_hooks()

    def _put_hooks(self) -> None:
        model = self.model
        self.installed = True
        base_config: Any = getattr(model, "config", None)
        if base_config is not None:
            own = getattr(type(base_config), "keys_to_ignore_at_inference", ())
            base_config.keys_to_ignore_at_inference = [*own, *NOT_GATHERED]
        self._hooks = [
            model.register_forward_pre_hook(self._strip_arguments, with_kwargs=True),
            model.register_forward_hook(self._answer, with_kwargs=True),
        ]

    def install(self, layers: Iterable[int]) -> None:
        """Put the hooks back on the base model, with prefixes in these blocks."""
        self.tokens.install()
        self.prefixes.install(layers)
        self.last.install()
        self._put_hooks()

    def move_behind(self) -> None:
        """Take the hooks off the blocks and put them back, behind those that others have put there."""
        layers = self.prefixes.layers
        for part in (self.last, self.prefixes, self.tokens):
            part.uninstall()
        self.tokens.install()
        self.prefixes.install(layers)
        self.last.install()

    def release(self, layers: Iterable[int]) -> None:
        """Take the prefixes' hooks off all blocks but these, and the last one, which is always prepared."""
        self.prefixes.uninstall(keep={*layers, len(self.structure.blocks) - 1})

    def uninstall(self) -> None:
        """Take every hook off the base model, and copies of its modules out of it."""
        self.tokens.uninstall()
        self.last.uninstall()
        self.prefixes.uninstall()
        for hook in self._hooks:
            hook.remove()
        self.installed = False
        for name, module in list(self.model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):  # of `modules_to_save`
                self.model.set_submodule(name, module.original_module)
        if hasattr(self.model, "config"):
            vars(self.model.config).pop("keys_to_ignore_at_inference", None)

    @contextmanager
    def prompted(
        self,
        adapter: PoolAdapter,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        training: bool,
        only_features: bool = False,
    ) -> Iterator[None]:
        """Until the block ends, a forward of the base model with these arguments is the adapter's answer.

        With `only_features` a classifier that is made from features is not asked.
        """
        if not self.installed:
            raise ValueError(
                "the base of this model was unloaded, or went to another prompt pool model: use that one (load_adapter "
                "keeps several adapters on one base), or wrap the base anew"
            )
        self.last.prove()
        try:
            with whole_image(self.model, self.structure):
                self._call = self._prepare(adapter, args, kwargs, training)
                self._call.only_features = only_features
                yield
        finally:
            self._call = None
            self.lower.clear()
            self.last.clear()
            self.tokens.clear()
            self.prefixes.clear()

    def query(self, adapter: PoolAdapter, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The un-prompted pass: the adapter's query feature of each image, [B, D] float32, without gradient."""
        images: Any = kwargs.get("pixel_values", args[0] if args else None)
        check_images(self.model, self.structure, images, kwargs)
        self.last.prove()
        if adapter.query_pooling == "cls":
            self.last.read(0)
        try:
            with torch.no_grad(), whole_image(self.model, self.structure):
                self.model(*args, **kwargs, **in_order_noise(self.model, self.structure, kwargs, images))
                return take_feature(self.model, self.structure, self.tokens, adapter.query_pooling)
        finally:
            self.last.clear()
            self.tokens.clear()

    def hidden_states(self, adapter: PoolAdapter, kwargs: dict[str, Any]) -> Tensor:
        """What enters the adapter's lowest prompted block in the un-prompted pass: [B, N, D], without gradient."""
        try:
            with self.lower.keep(self._lowest(adapter)):
                self.query(adapter, (), kwargs)
            return self.lower.states
        finally:
            self.lower.clear()

    @torch.no_grad()
    def patch_embeddings(self, images: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """What enters block 0 for the patches of images, positions included: [patches of all images, D] float32."""
        check_images(self.model, self.structure, images, kwargs)
        self.tokens.keep_embeddings = True
        try:
            with whole_image(self.model, self.structure):
                noise = in_order_noise(self.model, self.structure, kwargs, images)
                self.model(pixel_values=images, **kwargs, **noise)
                assert self.tokens.embeddings is not None
                patches = self.tokens.embeddings[:, self.structure.special_tokens :].float()
        finally:
            self.tokens.keep_embeddings = False
            self.tokens.clear()
        real = kwargs.get("pixel_attention_mask")  # SigLIP 2 fills images up to one number of patches
        return patches.flatten(0, 1) if real is None else patches[real.bool()]

    def _prepare(self, adapter: PoolAdapter, args: tuple[Any, ...], kwargs: dict[str, Any], training: bool) -> Call:
        """Check the input, run the un-prompted pass if the pool asks for it, set the prompts."""
        images: Any = kwargs.get("pixel_values", args[0] if args else None)
        labels, query = kwargs.get("labels"), kwargs.get("query")
        base_kwargs = {name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}
        check_images(self.model, self.structure, images, base_kwargs)
        if labels is not None:
            check_labels(labels, len(images))
        check_ready(adapter, learning=training and labels is not None)
        targets = adapter.to_columns(labels) if labels is not None else None
        everything = torch.ones(len(images), dtype=torch.bool, device=images.device)
        valid = everything if targets is None else targets >= 0
        hidden, below = kwargs.get("hidden"), 0
        if hidden is not None:
            check_hidden(hidden, len(images), self.structure.shape.width)
            below = self._lowest(adapter)
            self.lower.take(below, hidden.detach(), lambda: self.query(adapter, args, base_kwargs))
            self.lower.skip()
        if query is None and adapter.pool.needs_query:
            # A gradient to the images goes through both passes, and a graph of the whole model cannot hold what is kept.
            again = not images.requires_grad and not torch.compiler.is_compiling()
            if again and hidden is None:
                below = self._unprompted_blocks(adapter)
            with self.lower.keep(below) if again else nullcontext():
                query = self.query(adapter, args, base_kwargs)
        if query is not None:
            check_query(query, len(images), self.structure.shape.width)
            query = query.detach().float()
        task = max(adapter.pool.num_tasks - 1, 0) if training else None
        with torch.autocast(images.device.type, enabled=False):
            prompts = adapter.pool(PoolInput(len(images), query, task, valid))
        self._set_prompts(prompts)
        self.prefixes.learning = training
        if prompts.candidates == 1 and (prompts.tokens is None or not below):
            self.lower.skip()
        else:
            self.lower.clear()
        self._read_only(adapter.readout)
        return Call(
            adapter=adapter,
            prompts=prompts,
            batch_size=len(images),
            training=training,
            query=query,
            targets=targets,
            valid=valid,
            sample_ids=kwargs.get("sample_ids"),
            num_items=kwargs.get("num_items_in_batch"),
            noise=in_order_noise(self.model, self.structure, base_kwargs, images),
        )

    def _unprompted_blocks(self, adapter: PoolAdapter) -> int:
        """How many blocks come before the first prompt, and give the same numbers in both passes."""
        lowest = min(adapter.pool.layers, default=0)
        return lowest if lowest and self.lower.may_skip(lowest) else 0

    def _lowest(self, adapter: PoolAdapter) -> int:
        """The lowest prompted block. Raises ValueError where the blocks below it must run."""
        below = self._unprompted_blocks(adapter)
        if not below:
            raise ValueError(
                "no hidden states can be kept: the prompts enter block 0, or what is below is trained, compiled or hooked"
            )
        return below

    def _read_only(self, readout: str) -> None:
        """Have the last block compute no more than what a classifier reads."""
        tokens, index = self.tokens.tokens, self.tokens.index
        inserted = 0 if tokens is None else tokens.shape[1]
        if readout == "cls":
            self.last.read(inserted if index == 0 else 0)
        elif readout == "prompt":
            self.last.read(index, inserted)

    def _set_prompts(self, prompts: Prompts) -> None:
        tokens = prompts.tokens
        if tokens is not None and prompts.tokens_take_cls_position:
            position = cls_position_embedding(self.model, self.structure)
            tokens = tokens if position is None else tokens + position.detach()
        self.tokens.tokens = tokens
        self.tokens.index = int(prompts.tokens_after_cls and self.structure.has_cls)
        self.prefixes.prefixes = prompts.prefixes
        self.prefixes.used = {}

    def _strip_arguments(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._call
        if call is None:
            return None
        kwargs = {**{name: value for name, value in kwargs.items() if name not in OWN_ARGUMENTS}, **call.noise}
        if call.prompts.candidates > 1:

            def repeat(value: Any) -> Any:
                per_image = isinstance(value, Tensor) and value.dim() and len(value) == call.batch_size
                return value.repeat_interleave(call.prompts.candidates, 0) if per_image else value

            args, kwargs = tuple(map(repeat, args)), {name: repeat(value) for name, value in kwargs.items()}
        return args, kwargs

    def _answer(self, base: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call = self._call
        if call is None:
            return None
        adapter = call.adapter
        with torch.autocast(call.valid.device.type, enabled=False):
            features = take_feature(self.model, self.structure, self.tokens, adapter.readout)
            logits = adapter.head(features) if call.training or call.only_features else adapter.classify(features)
            chosen = self._chosen(call.prompts)
            if call.prompts.candidates > 1:
                logits, features, chosen = answer_together(call, logits, features, chosen)
            loss, losses = None, None
            logits = masked(call, logits) if call.training else logits / adapter.config.logit_temperature
            if call.targets is not None:
                learns = call.training and not adapter.frozen
                parts = self._parts(call, features, chosen.scores) if learns else {}
                loss, losses = loss_of(call, logits, parts)
        if call.training and not adapter.frozen:
            with torch.no_grad(), torch.autocast(call.valid.device.type, enabled=False):
                fresh = adapter.ledger.fresh(call.sample_ids, call.valid)
                seen = Observation(chosen.ids, call.query, call.targets, call.valid, fresh, chosen.scores, features)
                adapter.pool.observe(seen)
        answer = PromptPoolOutput(
            loss=loss,
            logits=logits,
            losses=losses,
            prompt_ids=chosen.ids,
            prompt_weights=chosen.weights,
            scores=chosen.scores,
            query=call.query,
            features=features,
        )
        return answer.to_tuple() if kwargs.get("return_dict") is False else answer

    def _chosen(self, prompts: Prompts) -> Chosen:
        """What was chosen: by the pool, or by the layers, stacked to [B, layers, ...]."""
        used = [self.prefixes.used[layer] for layer in sorted(self.prefixes.used)]

        def stacked(own: Tensor | None, by_layer: list[Tensor | None]) -> Tensor | None:
            found = [value for value in by_layer if value is not None]
            return torch.stack(found, 1) if own is None and found else own

        return Chosen(
            stacked(prompts.ids, [kv.ids for kv in used]),
            stacked(prompts.weights, [kv.weights for kv in used]),
            stacked(prompts.scores, [kv.scores for kv in used]),
        )

    def _parts(self, call: Call, features: Tensor, scores: Tensor | None) -> dict[str, LossPart]:
        """The method's terms of the training loss; those of one name are added up over the layers."""
        assert call.targets is not None
        pool = call.adapter.pool
        parts: dict[str, LossPart] = {}
        for found in (
            call.prompts.losses,
            *(kv.losses for kv in self.prefixes.used.values()),
            pool.regularizers(scores, call.valid),
            pool.feature_losses(features, call.targets, call.valid),
        ):
            for name, part in found.items():
                known = parts.get(name)
                parts[name] = part if known is None else LossPart(known.value + part.value, part.reduction)
        return parts


def ways_through(model: nn.Module) -> set[WayOfABatch]:
    """The ways that are installed on a base model: one, or none."""
    owners = [getattr(hook, "__self__", None) for hook in model._forward_hooks.values()]
    return {owner for owner in owners if isinstance(owner, WayOfABatch)}
