/* Compressed clusters: deflate by libz, zstd by libzstd, as the system has them. Nobody needs their headers to build
 * this: what their stable interfaces ask for is declared here. */
#include "qcow2_image.h"

#include <dlfcn.h>
#include <pthread.h>

/* zlib.h's z_stream. */
struct deflate_stream {
    const uint8_t *next_in;
    unsigned int avail_in;
    unsigned long total_in;
    uint8_t *next_out;
    unsigned int avail_out;
    unsigned long total_out;
    const char *msg;
    void *state;
    void *(*zalloc)(void *, unsigned int, unsigned int);
    void (*zfree)(void *, void *);
    void *opaque;
    int data_type;
    unsigned long adler;
    unsigned long reserved;
};

struct zstd_in {
    const void *bytes;
    size_t size, at;
};

struct zstd_out {
    void *bytes;
    size_t size, at;
};

#define Z_OK 0
#define Z_STREAM_END 1
#define Z_BUF_ERROR (-5)
#define Z_FINISH 4
#define RAW_DEFLATE (-15) /* no header; any window */
#define ZSTD_WINDOW_LOG_MAX 100 /* ZSTD_d_windowLogMax */
#define WINDOW_LOG 22 /* a frame never needs more than its cluster of 2 MiB; a lie allocates no more than 4 MiB */

static struct {
    int (*init)(struct deflate_stream *, int, const char *, int);
    int (*inflate)(struct deflate_stream *, int);
    int (*end)(struct deflate_stream *);
} zlib;

static struct {
    void *(*make)(void);
    size_t (*free)(void *);
    size_t (*set)(void *, int, int);
    size_t (*decompress)(void *, struct zstd_out *, struct zstd_in *);
    unsigned (*is_error)(size_t);
} zstd;

static pthread_once_t once = PTHREAD_ONCE_INIT;
static int has_zlib, has_zstd;

static void load(void)
{
    void *from = dlopen("libz.so.1", RTLD_NOW | RTLD_LOCAL);
    if (from) {
        *(void **)&zlib.init = dlsym(from, "inflateInit2_");
        *(void **)&zlib.inflate = dlsym(from, "inflate");
        *(void **)&zlib.end = dlsym(from, "inflateEnd");
        has_zlib = zlib.init && zlib.inflate && zlib.end;
    }
    from = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
    if (from) {
        *(void **)&zstd.make = dlsym(from, "ZSTD_createDCtx");
        *(void **)&zstd.free = dlsym(from, "ZSTD_freeDCtx");
        *(void **)&zstd.set = dlsym(from, "ZSTD_DCtx_setParameter");
        *(void **)&zstd.decompress = dlsym(from, "ZSTD_decompressStream");
        *(void **)&zstd.is_error = dlsym(from, "ZSTD_isError");
        has_zstd = zstd.make && zstd.free && zstd.set && zstd.decompress && zstd.is_error;
    }
}

/* The library that this system lacks for a header's compression type, or NULL. */
const char *qcow2_inflater_missing(uint32_t compression)
{
    pthread_once(&once, load);
    if (compression)
        return has_zstd ? NULL : "libzstd.so.1";
    return has_zlib ? NULL : "libz.so.1";
}

static int inflate_deflate(const uint8_t *from, uint64_t length, uint8_t *to, uint64_t size)
{
    struct deflate_stream stream = {
        .next_in = from, .avail_in = (unsigned int)length, .next_out = to, .avail_out = (unsigned int)size};
    if (zlib.init(&stream, RAW_DEFLATE, "1.2.11", (int)sizeof stream) != Z_OK)
        return -1;
    int end = zlib.inflate(&stream, Z_FINISH);
    zlib.end(&stream);
    return (end == Z_STREAM_END || end == Z_BUF_ERROR) && !stream.avail_out ? 0 : -1;
}

static int inflate_zstd(const uint8_t *from, uint64_t length, uint8_t *to, uint64_t size)
{
    struct zstd_in in = {.bytes = from, .size = length};
    struct zstd_out out = {.bytes = to, .size = size};
    void *context = zstd.make();
    if (!context)
        return -1;
    int failed = zstd.is_error(zstd.set(context, ZSTD_WINDOW_LOG_MAX, WINDOW_LOG)) != 0;
    while (!failed && out.at < out.size) {
        size_t in_before = in.at, out_before = out.at;
        if (zstd.is_error(zstd.decompress(context, &out, &in)) || (in.at == in_before && out.at == out_before))
            failed = 1; /* damaged, or it ends too early */
    }
    zstd.free(context);
    return failed ? -1 : 0;
}

/* `length` bytes into exactly `size`; what they hold beyond that is left. -1: they are not what they should be. */
int qcow2_inflate(uint32_t compression, const uint8_t *from, uint64_t length, uint8_t *to, uint64_t size)
{
    if (qcow2_inflater_missing(compression))
        return -1;
    return compression ? inflate_zstd(from, length, to, size) : inflate_deflate(from, length, to, size);
}
