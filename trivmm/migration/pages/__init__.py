"""Guest pages on their way: which are to be sent, as which frames, and how they land."""
