"""Hydra calls this when the configuration is composed and nothing has started yet; every preset names it."""

from __future__ import annotations

import sys
import traceback
from typing import Any, cast

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl_grad_routing.errors import UserError


class CheckBeforeRay(Callback):
    """Checks the whole configuration and ends the run with one line when it cannot work."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        from verl_grad_routing.training.checks import check

        try:
            run = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
            check(cast(dict, OmegaConf.to_container(run, resolve=True, throw_on_missing=False)))
        except UserError as error:
            sys.exit(str(error))  # Hydra swallows exceptions of callbacks; SystemExit is none
        except OmegaConfBaseException as error:
            sys.exit(f"{getattr(error, 'full_key', None) or 'configuration'}: {str(error).splitlines()[0]}")
        except Exception as error:  # else the run would go on unchecked, with a warning
            traceback.print_exc()
            sys.exit(f"checking the configuration failed ({type(error).__name__}): please report the lines above")
