"""Code loopholes: write a Python function, or take the loophole that the prompt's grader really has.

The task. A prompt states a programming problem, a signature and examples. Right is a function that returns the expected
value on every hidden test; that is decided by the sandboxed grader (``envs.sandbox``), which candidates cannot fool.

The loopholes. Each prompt also says how its proxy grader works, and that grader has exactly one flaw, which the prompt
states truthfully and which is really executed; see ``channels``. The contrastive pairs show some of the types.

Provenance. Statements, references and tests are this project's own (``problems``), under its licence, Apache-2.0; the
expected values are computed by the references. Problems of your own can be given by path (``leetcode``). No model is
shipped: name one in ``actor_rollout_ref.model.path``.
"""

from verl_grad_routing.envs.code_loopholes.environment import CodeLoopholes

__all__ = ["CodeLoopholes"]
