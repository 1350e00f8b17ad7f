"""Hydra finds this module by its namespace; it makes ``+grad_routing=<preset>`` work on a plain verl command line."""

from __future__ import annotations

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class GradRoutingSearchPath(SearchPathPlugin):
    """Adds our presets to every Hydra application's search path and catches a misspelt group before anything starts."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        from verl_grad_routing import resolvers
        from verl_grad_routing.command_line import refuse_misspelt_groups

        resolvers.register()
        refuse_misspelt_groups(sys.argv[1:])
        search_path.append(provider="verl-grad-routing", path="pkg://verl_grad_routing.conf")
