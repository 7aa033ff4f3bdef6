// TorchServe's key of the moment: it writes a new one at each start, so the file is read for each request.
import fs from 'fs';

function inference() {
    try {
        return 'Bearer ' + JSON.parse(fs.readFileSync('/serving/key_file.json')).inference.key;
    } catch (error) {
        return '';  // it is starting; TorchServe refuses the request, or nobody listens yet
    }
}

export default {inference};
