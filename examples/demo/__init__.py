"""The demo lets a real chat model answer five prompts, plainly and with drafts."""
