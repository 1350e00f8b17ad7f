"""verl's actor worker with the few calls that routing adds to it."""

# The types that verl declares are narrower than what it passes.
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
from __future__ import annotations

from typing import Any

from tensordict import TensorDict
from torch import Tensor
from verl.plugin.platform import get_platform
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.utils import tensordict_utils as tu
from verl.utils.distributed import initialize_global_process_group_ray
from verl.workers.engine_workers import ActorRolloutRefWorker

from verl_grad_routing.bottleneck import Bottleneck, digest
from verl_grad_routing.training.bottleneck_step import READ
from verl_grad_routing.training.gradient_comparison import compare_gradients


class RoutedActorRolloutRefWorker(ActorRolloutRefWorker):
    """verl's worker; with the preset ``off`` its engine is verl's own and none of these calls is made."""

    def __init__(self, *args: Any, **kwargs: Any):
        if get_platform().device_name == "cpu":
            # verl would name the cpu twice in the backend string; an existing group it leaves alone
            initialize_global_process_group_ray(backend="cpu:gloo")
        super().__init__(*args, **kwargs)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def export_blocks(self, blocks: tuple[str, ...]) -> None:
        """Which blocks the next weight syncs send: both, ``deployed`` alone or ``quarantine`` alone."""
        self.actor.engine.exported_blocks = blocks

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def model_shape(self) -> dict[str, int]:
        """Decoder layers and hidden size, for directions."""
        engine = self.actor.engine
        return {"layers": len(engine.probe.layers), "hidden_size": engine.module.config.get_text_config().hidden_size}

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def pool_activations(self, data: TensorDict) -> TensorDict | None:
        """Pooled activations of given texts: rows of the result are ``activation_pooled`` [B, L * d]."""
        output = self.actor.infer_batch(data)
        return output.select("activation_pooled").cpu() if output is not None else None

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compare_gradients(self, data: TensorDict) -> TensorDict:
        """Gradients of a training batch under other masks and advantages, compared; nothing is stepped."""
        found = compare_gradients(self.actor, data)
        return tu.get_tensordict(tensor_dict={}, non_tensor_dict={"metrics": found}).cpu()

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def fingerprint(self, data: TensorDict) -> TensorDict | None:
        """Gradient fingerprints of rows that name a ``gradient_probe``: ``fingerprints`` [B, F], float32."""
        output = self.actor.infer_batch(data)
        return output.select("fingerprints").cpu() if output is not None else None

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def bottleneck_modules(self, bottleneck: Bottleneck) -> tuple[tuple[str, ...], Tensor]:
        """Make the bases of ``bottleneck``: names of its modules, and the digest that tells its bases apart."""
        engine = self.actor.engine
        with engine.eval_mode():
            bases = engine.probe.bases.of(bottleneck)
        return tuple(bases), digest(bases)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def bottleneck_gradients(self, data: TensorDict) -> TensorDict | None:
        """Bottleneck gradients of rows that ask for them: ``bottleneck_gradients`` [B, M * r] or scores [B, D]."""
        output = self.actor.infer_batch(data)
        return output.select(READ).cpu() if output is not None else None
