"""The demo lets a real chat model answer five prompts, plain and with a draft head."""
