"""Reference models and their cards: the demo's pretrained base now, one card a released model later."""
