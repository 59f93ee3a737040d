"""The warm process inside an allocation: load, pack, train, score, checkpoint. The only room with torch."""
