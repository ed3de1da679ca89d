"""The five claims of `training/PROTOCOL.md`: what is measured, how, its results files, and the page made of them."""
