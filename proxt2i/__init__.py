"""ProxT2I: text-to-image diffusion with learned proximal operators."""

__version__ = "0.1.0"
