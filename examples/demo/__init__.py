"""The demo: a real chat model answers five prompts, plain and with a draft head."""
