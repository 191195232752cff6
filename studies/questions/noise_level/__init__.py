"""Is the noise level decodable where the model is not told it, and does moving along it change what loops do?"""
