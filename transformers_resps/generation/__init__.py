"""What `generate` meets: `attach`, the mixin, the arguments of a call and their checks."""
