"""Using a ranker: rank a list, explain a ranking, serve both over HTTP"""
