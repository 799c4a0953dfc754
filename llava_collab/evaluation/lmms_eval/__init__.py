"""Our models inside lmms-eval: a model plugin found by entry point, and the messages that its tasks are asked in."""
