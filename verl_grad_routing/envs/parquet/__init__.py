"""Parquet: any environment that is already in verl's format, with a reward function of its own.

``vgr prepare parquet --to DIR --settings env.yaml`` checks it and writes a folder like every other environment's::

    train: data/train.parquet            # verl's format: data_source, prompt, reward_model.ground_truth
    val: data/val.parquet
    test: data/test.parquet              # optional; no two of the three may share a prompt
    reward: my_rewards.py:compute_score  # or package.module:function
    pairs: pairs.jsonl@shortcut          # every tag is a known type
    loopholes: [shortcut, sycophancy]    # all types
    known: [shortcut]                    # those that the pairs show
    facts:                               # where the grader's facts are: a key of what the reward function returns,
      hack: is_hack                      #   or extra_info.<field> of the row
      solve: correct
      loophole: extra_info.kind
"""

from verl_grad_routing.envs.parquet.environment import Parquet

__all__ = ["Parquet"]
