"""Retrieval heads: the few heads that copy from far back, found by trials, and what they are worth in memory.

    trials      needle, haystack and question as token ids
    detection   which heads look at the answer while the model copies it -> HeadScores
    scores      HeadScores: per head, per trial, saved and loaded
    picture     a heat map of them
    masking     do they matter? silence them, and as many others
    budgets     scores -> how much cache each KV head gets

Paper: Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality", ICLR 2025, arXiv:2404.15574.
"""
