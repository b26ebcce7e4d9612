"""The networks that structured pruning is tested on, by name; see `network_tools` for what to do with one."""

from diffusers_networks import diffusers_networks
from handwritten import handwritten_networks
from network_tools import Network, available, output_tensors, use_networks, vary, warm_up
from timm_networks import timm_networks
from torchvision_networks import torchvision_networks
from transformers_networks import transformers_networks

__all__ = ["NETWORKS", "Network", "available", "output_tensors", "use_networks", "vary", "warm_up"]


def _by_name(*lists: list[Network]) -> dict[str, Network]:
    found: dict[str, Network] = {}
    for network in (network for networks in lists for network in networks):
        if network.name in found:
            raise ValueError(f"two networks are called '{network.name}'; rename the one of {network.family}")
        found[network.name] = network
    return found


NETWORKS: dict[str, Network] = _by_name(
    handwritten_networks(), torchvision_networks(), timm_networks(), transformers_networks(), diffusers_networks()
)
