class Dictionary: pass
