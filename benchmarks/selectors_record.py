def write(path):
    print(path)
