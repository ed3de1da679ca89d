"""Static buffers in the order of the text, the forwards over them, and the code that runs these compiled."""
