"""What is alike from loop to loop, and does the content advance?"""
