"""Changes of a model's modules, and what the modules were called with: to make to two models and compare."""

import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization


class Adapted(nn.Module):
    """A frozen layer and a trained change, with the layer's weights in reach, as adapters have them."""

    def __init__(self, base):
        super().__init__()
        self.base, self.gain = base.requires_grad_(False), nn.Parameter(torch.tensor(0.3))

    def __getattr__(self, name):
        modules = self.__dict__.get("_modules", {})
        if name in ("base", "gain") or "base" not in modules:
            return super().__getattr__(name)
        return getattr(modules["base"], name)

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs) * (1 + self.gain)


class Scaled(nn.Module):
    """A parametrisation that counts how often it is asked."""

    def __init__(self):
        super().__init__()
        self.factor, self.asked = nn.Parameter(torch.tensor(1.4)), 0

    def forward(self, weight):
        self.asked += 1
        return weight * self.factor


def leaves(model):
    return [name for name, module in model.named_modules() if not list(module.children())]


def adapt(model, name):
    """Puts an adapter around the module; its parameter that is trained."""
    adapted = Adapted(model.get_submodule(name))
    model.set_submodule(name, adapted)
    return adapted.gain


def parametrize(model, name):
    """Makes the parameter a function of another; that function."""
    owner, _, last = name.rpartition(".")
    scaled = Scaled()
    register_parametrization(model.get_submodule(owner), last, scaled)
    return scaled


def sloped(model, name):
    """A hook that changes what the module returns, more at the end of each row than at its start."""

    def slope(t):
        return t * torch.linspace(0.5, 1.5, t.shape[-1], dtype=t.dtype)

    def hook(module, args, output):
        return tuple(slope(o) for o in output) if isinstance(output, tuple) else slope(output)

    return model.get_submodule(name).register_forward_hook(hook)


def record(model, names):
    """Hooks on all modules of these names; the list of what they see: name, and every tensor that comes and goes."""
    seen = []

    def tensors(value):
        if isinstance(value, torch.Tensor):
            return [value.detach().clone()]
        return [t for v in value for t in tensors(v)] if isinstance(value, tuple | list) else []

    for name in names:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda m, args, name=name: seen.append((f"{name} <-", tensors(args))))
        module.register_forward_hook(lambda m, args, out, name=name: seen.append((f"{name} ->", tensors(out))))
    return seen
