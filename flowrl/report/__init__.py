"""Reports on finished runs: tables, charts and one offline page, made from their folders alone and
without torch.
"""
