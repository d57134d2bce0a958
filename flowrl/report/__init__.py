"""What finished runs say together: tables, charts and one offline page, from their folders alone;
torch-free.
"""
