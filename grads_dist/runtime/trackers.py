class Trackers:
    def close(self): pass
def open_trackers(*a): return Trackers()
